"""The understanding benchmarks by name: their files, how a row is asked, and how replies are scored.

The addresses are those from which VLMEvalKit reads the same tables, with the publishers' checksums; nothing is bundled.
Licences are those of each benchmark: see its page.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from diptych.core.errors import UserError, unknown
from diptych.evaluation.understanding import free_form, judged, multiple_choice, question, true_or_false
from diptych.evaluation.understanding.judged import Reading
from diptych.evaluation.understanding.multiple_choice import ROTATION
from diptych.evaluation.understanding.question import Prompt
from diptych.evaluation.understanding.scored import Row, Scorer
from diptych.evaluation.understanding.table import Table

KIT = "https://opencompass.openxlab.space/utils/"
VSR = "https://huggingface.co/datasets/ignoreandfly/vsr_zeroshot_tsv/resolve/main/"
MORE, LONG = 128, 512

Together = Callable[[Row, int], Hashable]
"""(row, its position) to what it shares with the rows that are only worth something together with it."""


@dataclass(frozen=True, kw_only=True)
class DataFile:
    """A published file: its name in the data folder, where it is, and its MD5 as its publisher gives it."""

    name: str
    url: str
    md5: str


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One benchmark.

    files: its tables; several are read one after the other. prompt: a row to the text of its question.
    score: a pure function of rows and replies; `reading` where a judge is needed. together: see `Together`.
    split: of a file that holds several, the one that is asked. max_new_tokens: most tokens of a reply.
    home: the folder of its files in a data folder, where it is not its name.
    """

    name: str
    files: tuple[DataFile, ...]
    prompt: Prompt
    score: Scorer | None = None
    reading: Reading | None = None
    together: Together | None = None
    split: str | None = None
    max_new_tokens: int = 64
    home: str | None = None

    @property
    def folder(self) -> str:
        """The folder of its files in a data folder."""
        return self.home or self.name

    def tables(self, folder: Path) -> list[Table]:
        """Its tables in a data folder; a parquet file of the same name stands for a TSV.

        Raises:
            UserError: a file is not there; the line says where it is published.
        """
        tables: list[Table] = []
        for file in self.files:
            path = folder / file.name
            other = path.with_suffix(".parquet")
            if not path.is_file() and other.is_file():
                path = other
            if not path.is_file():
                raise UserError(f"{self.name}: {path} is not there; it is published at {file.url}")
            tables.append(Table(path))
        return tables


def _kit(path: str, md5: str) -> DataFile:
    return DataFile(name=path.rsplit("/", 1)[-1], url=KIT + path, md5=md5)


def _choice(
    name: str, *files: DataFile, score: Scorer = multiple_choice.accuracy, together: Together | None = None
) -> Benchmark:
    return Benchmark(name=name, files=files, prompt=question.letter, score=score, together=together)


def _yes_no(name: str, file: DataFile, score: Scorer, together: Together | None = None) -> Benchmark:
    return Benchmark(name=name, files=(file,), prompt=question.yes_no, score=score, together=together)


def _rotations(row: Row, at: int) -> Hashable:
    return int(row["index"]) % ROTATION


def _pair(row: Row, at: int) -> Hashable:
    return int(row["index"]) // 2


def _neighbours(row: Row, at: int) -> Hashable:
    return at // 2


def _figure_set(row: Row, at: int) -> Hashable:
    return row["l2-category"], str(row["index"]).rsplit("_", 3)[0]


_EVERY = (
    _choice("mmbench_dev_en", _kit("benchmarks/MMBench/MMBench_DEV_EN.tsv", "b6caf1133a01c6bb705cf753bb527ed8"),
            score=multiple_choice.circular, together=_rotations),
    _choice("mmbench_dev_en_v11", _kit("benchmarks/MMBench/MMBench_DEV_EN_V11.tsv", "30c05be8f2f347a50be25aa067248184"),
            score=multiple_choice.circular, together=_rotations),
    _choice("mmbench_test_en", _kit("benchmarks/MMBench/MMBench_TEST_EN.tsv", "6939fadb0ce626fefc0bdc9c64efc528"),
            score=multiple_choice.circular, together=_rotations),
    _choice("mmbench_test_en_v11",
            _kit("benchmarks/MMBench/MMBench_TEST_EN_V11.tsv", "8d1a704e791df6f5d9fb3ef782b65365"),
            score=multiple_choice.circular, together=_rotations),
    _choice("seedbench_img", _kit("benchmarks/SEEDBench/SEEDBench_IMG.tsv", "68017231464752261a2526d6ca3a10c0")),
    _choice("scienceqa_val", _kit("benchmarks/ScienceQA/ScienceQA_VAL.tsv", "96320d05e142e585e7204e72affd29f3")),
    _choice("scienceqa_test", _kit("benchmarks/ScienceQA/ScienceQA_TEST.tsv", "e42e9e00f9c59a80d8a5db35bc32b71f")),
    _choice("ai2d", _kit("VLMEval/AI2D_TEST.tsv", "0f593e0d1c7df9a3d69bf1f947e71975")),
    _choice("mmstar", _kit("VLMEval/MMStar.tsv", "e1ecd2140806c1b1bbf54b43372efb9e")),
    _choice("realworldqa", _kit("VLMEval/RealWorldQA.tsv", "4de008f55dc4fd008ca9e15321dc44b7")),
    _choice("blink", _kit("VLMEval/BLINK.tsv", "d5e8af148b10ac69f535ff7b23f3f989")),
    _choice("cv_bench", _kit("VLMEval/CV-Bench-2D.tsv", "a7cff4cc2857cc237ee2b89e62bccb2d"),
            _kit("VLMEval/CV-Bench-3D.tsv", "bb94c0d568d652d15b60e001ac40a170"), score=multiple_choice.cv_bench),
    replace(_choice("cv_bench_2d", _kit("VLMEval/CV-Bench-2D.tsv", "a7cff4cc2857cc237ee2b89e62bccb2d"),
                    score=multiple_choice.cv_bench), home="cv_bench"),
    _choice("mmvp", _kit("VLMEval/MMVP.tsv", "8cb732b141a0cba5b42159df2839e557"),
            score=multiple_choice.pairs, together=_pair),
    Benchmark(name="mmmu_val", files=(_kit("VLMEval/MMMU_DEV_VAL.tsv", "585e8ad75e73f75dcad265dfd0417d64"),),
              prompt=question.letter, score=multiple_choice.mmmu, split="validation"),
    _yes_no("mme", _kit("VLMEval/MME.tsv", "b36b43c3f09801f5d368627fb92187c3"), true_or_false.mme, _neighbours),
    _yes_no("hallusion_bench", _kit("VLMEval/HallusionBench.tsv", "0c23ac0dc9ef46832d7a24504f2a0c7c"),
            true_or_false.hallusion_bench, _figure_set),
    _yes_no("pope", _kit("VLMEval/POPE.tsv", "c12f5acb142f2ef1f85a26ba2fbe41d5"), true_or_false.pope),
    _yes_no("vsr", DataFile(name="vsr_zeroshot_dataset_yn_strict.tsv", url=VSR + "vsr_zeroshot_dataset_yn_strict.tsv",
                            md5="5ff5e49908ac1cfad35c60b92b001aeb"), true_or_false.accuracy),
    Benchmark(name="docvqa_val", files=(_kit("VLMEval/DocVQA_VAL.tsv", "d5ee77e1926ff10690d469c56b73eabf"),),
              prompt=question.short, score=free_form.doc_vqa),
    Benchmark(name="chartqa", files=(_kit("VLMEval/ChartQA_TEST.tsv", "c902e0aa9be5582a7aad6dcf52734b42"),),
              prompt=question.short, score=free_form.chart_qa),
    Benchmark(name="ocrbench", files=(_kit("VLMEval/OCRBench.tsv", "e953d98a987cc6e26ef717b61260b778"),),
              prompt=question.bare, score=free_form.ocr_bench, max_new_tokens=MORE),
    Benchmark(name="mathvista", files=(_kit("VLMEval/MathVista_MINI.tsv", "f199b98e178e5a2a20e7048f5dcb0464"),),
              prompt=question.bare, reading=judged.MATH_VISTA, max_new_tokens=LONG),
    Benchmark(name="mmvet", files=(_kit("VLMEval/MMVet.tsv", "748aa6d4aa9d4de798306a63718455e3"),),
              prompt=question.bare, reading=judged.MM_VET, max_new_tokens=LONG),
)  # fmt: skip
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for benchmark in _EVERY}


def benchmark(name: str) -> Benchmark:
    """The benchmark of a name."""
    if name not in BENCHMARKS:
        raise unknown("benchmark", name, BENCHMARKS)
    return BENCHMARKS[name]


def kept(rows: Sequence[Row], limit: int | None, together: Together | None) -> list[int]:
    """Positions of the first `limit` rows, in order; with `together`, whole groups until there are as many."""
    if limit is None or limit >= len(rows):
        return list(range(len(rows)))
    if limit < 1:
        raise UserError(f"limit must be at least 1, not {limit}")
    groups: dict[Hashable, list[int]] = {}
    for at, row in enumerate(rows):
        groups.setdefault(at if together is None else together(row, at), []).append(at)
    positions: list[int] = []
    for group in groups.values():
        if len(positions) >= limit:
            break
        positions += group
    return sorted(positions)
