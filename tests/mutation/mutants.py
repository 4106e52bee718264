"""Faults that the tests are there to find: each is put into a copy of the tree, and the nearest tests run.

python tests/mutation/mutants.py [NAME ...]     prints killed or SURVIVED for each; run by hand, minutes long
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[2]
NUMBERS, SYSTEMS = "tests/training/test_numbers.py", "tests/systems/test_training_numbers.py"
ALIGNING, FLOW = "tests/systems/test_aligning.py", "tests/objectives/test_flow_matching.py"
ROUTING, ROUTES = "tests/parts/decoders/test_routing.py", "tests/systems/test_routing.py"
MUTANTS: dict[str, tuple[str, str, str, str]] = {
    "loss weights ignored": ("training/step.py", "weight(config.loss_weights, name)", "1.0", NUMBERS),
    "clipping off": ("training/loop.py", "config.max_grad_norm)", "1e30)", NUMBERS),
    "weight decay dropped": ("training/optimizers.py", "weight_decay=config.weight_decay", "weight_decay=0.0", NUMBERS),
    "betas ignored": ("training/optimizers.py", "betas=config.betas", "betas=(0.9, 0.999)", NUMBERS),
    "adjust_lr_fn dropped": ("training/optimizers.py", 'adjust_lr_fn="match_rms_adamw"', "adjust_lr_fn=None", NUMBERS),
    "averages twice a step": ("training/loop.py", "ema.update(skip)", "[ema.update(skip), ema.update(skip)]", NUMBERS),
    "validation without averages": ("training/loop.py", "with ema.applied() if ema else", "with", NUMBERS),
    "held-out loss in train mode": ("training/loop.py", "    system.eval()\n", "", NUMBERS),
    "dropout seed not per step": (
        "training/loop.py",
        "config.name, step.number, rank))",
        "config.name, rank))",
        NUMBERS,
    ),
    "answers' label leak": (
        "systems/conversation.py",
        "backbone.logits(hidden[rows, places])",
        "backbone.logits(hidden[rows, places + 1])",
        SYSTEMS,
    ),
    "drop_all and drop_text exchanged": (
        "systems/presets.py",
        "cfg_dropout=self.cfg_dropout_all,\n            cfg_dropout_text=self.cfg_dropout_text",
        "cfg_dropout=self.cfg_dropout_text,\n            cfg_dropout_text=self.cfg_dropout_all",
        SYSTEMS,
    ),
    "BAGEL's training time shift ignored": (
        "systems/bagel/system.py",
        "settings.flow.times(on_cpu, [len(tokens[number][-1]) for number in drawn])",
        "settings.flow.draw_times(on_cpu)",
        SYSTEMS,
    ),
    "BAGEL's drops exchanged in losses": (
        "systems/bagel/examples.py",
        "drop=first < config.cfg_dropout_vae)\n            self._add_vision(example, part, vision_size(config, True), "
        "count, second < config.cfg_dropout_vit)",
        "drop=first < config.cfg_dropout_vit)\n            self._add_vision(example, part, vision_size(config, True), "
        "count, second < config.cfg_dropout_vae)",
        SYSTEMS,
    ),
    "BAGEL's drops exchanged in encode": (
        "systems/bagel/system.py",
        '"vision": settings.cfg_dropout_vit,\n            "latent": settings.cfg_dropout_vae',
        '"vision": settings.cfg_dropout_vae,\n            "latent": settings.cfg_dropout_vit',
        SYSTEMS,
    ),
    "shared time of the coarsest scale": (
        "systems/scaled.py",
        "flow.times(draws, tokens(data[-1]))",
        "flow.times(draws, tokens(data[0]))",
        SYSTEMS,
    ),
    "Sampling's shift ignored": (
        "inference/sampling.py",
        "make_solver(self.solver, self.steps, shift,",
        "make_solver(self.solver, self.steps, 1.0,",
        "tests/inference/test_numbers.py",
    ),
    "the smallest time": (
        "objectives/flow_matching.py",
        "SMALLEST_TIME = 0.05",
        "SMALLEST_TIME = 0.01",
        SYSTEMS,
    ),
    "the 95% interval": (
        "evaluation/intervals.py",
        "Z = 1.959963984540054",
        "Z = 1.6448536269514722",
        "tests/evaluation/test_numbers.py",
    ),
    "GenEval's threshold": (
        "evaluation/geneval.py",
        "    threshold: float = 0.3",
        "    threshold: float = 0.25",
        "tests/evaluation/test_numbers.py",
    ),
    "alignment of another block": (
        "parts/decoders/routing.py",
        "if number == layer:",
        "if number == (layer or 0) - 1:",
        ALIGNING,
    ),
    "OmniGen2's alignment of another block": (
        "parts/decoders/omnigen2_joint.py",
        "if number == layer:",
        "if number == (layer or 0) - 1:",
        ROUTING,
    ),
    "an image that the MLLM reads runs through the tower again": (
        "systems/preparing.py",
        "(read or known is not None)",
        "(known is not None)",
        ALIGNING,
    ),
    "the tower learns to be aligned": ("systems/aligning.py", ".detach()", "", ALIGNING),
    "routed tokens at others' places": (
        "parts/decoders/routing.py",
        "route.leave(turn, text.shape[1], count)",
        "turn[:, : x.shape[1] + (0 if start else text.shape[1])]",
        ROUTING,
    ),
    "the first block that tokens skip": (
        "parts/decoders/routing.py",
        "number == route.first:",
        "number == route.first + 1:",
        ROUTING,
    ),
    "the last block that tokens skip": (
        "parts/decoders/routing.py",
        "number == route.last:",
        "number == route.last - 1:",
        ROUTING,
    ),
    "OmniGen2's last block that tokens skip": (
        "parts/decoders/omnigen2_joint.py",
        "number == route.last:",
        "number == route.last - 1:",
        ROUTING,
    ),
    "routed tokens in the order of their draws": ("core/draws.py", "[:size].sort().values", "[:size]", ROUTES),
    "the share that is kept": (
        "systems/presets.py",
        "count - round(self.share * count)",
        "round(self.share * count)",
        ROUTES,
    ),
    "tokens routed outside training": (
        "systems/composed.py",
        "if self.training and self.options.token_routing",
        "if self.options.token_routing",
        ROUTES,
    ),
    "min-SNR's gamma": ("objectives/flow_matching.py", "MIN_SNR_GAMMA = 5.0", "MIN_SNR_GAMMA = 4.0", FLOW),
    "min-SNR's ratio": (
        "objectives/flow_matching.py",
        ".square().clamp(max=gamma)",
        ".clamp(max=gamma)",
        FLOW,
    ),
    "min-SNR's factor of data predictions": (
        "objectives/flow_matching.py",
        'per_data = t if prediction == "velocity" else t.clamp_min(SMALLEST_TIME)',
        "per_data = t",
        FLOW,
    ),
}
"""File below src/diptych, text, what takes its place (everywhere), tests."""


@cache
def without_fault(tests: str, folder: Path) -> bool:
    """Whether tests pass on the tree as it is."""
    return passes(tests, folder)


def passes(tests: str, folder: Path) -> bool:
    """Whether tests pass on the tree as it is now."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests]
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "OMP_NUM_THREADS": "1"}
    code = subprocess.run(command, cwd=folder, env=environment, capture_output=True, check=False).returncode
    if code > 1:
        raise SystemExit(f"{tests}: pytest ended with {code}")
    return code == 0


def killed(name: str, folder: Path) -> bool:
    """Whether the nearest tests fail on a tree with this fault."""
    file, before, after, tests = MUTANTS[name]
    path = folder / "src" / "diptych" / file
    text = path.read_text(encoding="utf-8")
    if not without_fault(tests, folder):
        raise SystemExit(f"{tests} fails without any fault; mend it first")
    if before not in text:
        raise SystemExit(f"{name}: {file} no longer holds {before!r}; write the mutant anew")
    path.write_text(text.replace(before, after), encoding="utf-8")
    try:
        return not passes(tests, folder)
    finally:
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        tree = Path(place) / "tree"
        shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(".git", ".venv*", "runs"))
        for mutant in sys.argv[1:] or MUTANTS:
            sys.stdout.write(f"{'killed  ' if killed(mutant, tree) else 'SURVIVED'} {mutant}\n")
            sys.stdout.flush()
