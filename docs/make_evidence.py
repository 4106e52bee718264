"""Writes the claims of docs/evidence.md, between two marks, from the package's studies and their committed results.

A study's results.json is committed as docs/evidence/NAME.json; every interval and verdict is computed anew from it, and
its plots are drawn into docs/images. What has no results says so. Run it after a study: python docs/make_evidence.py
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diptych.recipes import study, study_claims, study_results
from diptych.reports import markdown as md
from diptych.reports import study as reports

DOCS = Path(__file__).parent
PAGE, RESULTS, IMAGES = DOCS / "evidence.md", DOCS / "evidence", DOCS / "images"
BEGIN, END = "<!-- Written by docs/make_evidence.py -->", "<!-- Until here -->"
CLAIM = ["claim", "source", "paper"]
NOT_RUN = "not run"
VERDICTS = (study_claims.HOLDS, study_claims.FAILS, study_claims.UNKNOWN, NOT_RUN)
PLOTS = {"plot.png": "Scores of all rows", "curve.png": "Scores along a label", "steps.png": "Scores against steps"}


def results_of(name: str) -> dict[str, Any] | None:
    """The committed results of a study, judged anew; None where there are none.

    Raises:
        ValueError: its claims are not those of the study's file: a claim and its threshold stand before the run.
    """
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return None
    results = study_results.judged(json.loads(path.read_text(encoding="utf-8")))
    for claim, stated in stated_claims(name).items():
        if claim not in results["claims"] or results["claims"][claim]["stated"] != stated:
            raise ValueError(f"{path}: claim {claim!r} is not what studies/{name}.yaml states")
    return results


def stated_claims(name: str) -> dict[str, Any]:
    """The claims of a study's file, as a results.json holds them."""
    return {claim: study_results.stated(spec) for claim, spec in study.load(name).claims.items()}


def claims(found: dict[str, dict[str, Any] | None]) -> list[str]:
    """How many claims have which verdict, a table of those that were tested, and one of those that were not."""
    tested: list[list[str]] = []
    left: list[list[str]] = []
    verdicts: Counter[str] = Counter()
    for name, results in found.items():
        for claim, stated in stated_claims(name).items():
            entry = {"verdict": None} if results is None else results["claims"][claim]
            said, where = [stated["text"], stated["source"], stated["paper"]], f"`{name}`, `{claim}`"
            verdicts[entry["verdict"] or NOT_RUN] += 1
            if entry["verdict"] is None:
                left.append([*said, f"{stated['threshold']:g}", where])
                continue
            ours = [reports.difference(entry), str(len(entry.get("seeds", ())))]
            tested.append([*said, *ours, f"{stated['threshold']:g}", reports.verdict(entry), where])
    counts = ", ".join(f"{verdict}: {verdicts[verdict]}" for verdict in VERDICTS)
    of_tested = ["ours: difference, 95% interval", "seeds", "threshold", "verdict", "study, claim"]
    return [
        f"Of {sum(verdicts.values())} claims, {counts}.",
        *(["", *md.table([*CLAIM, *of_tested], tested)] if tested else []),
        *(["", "Not run yet:", "", *md.table([*CLAIM, "threshold", "study, claim"], left)] if left else []),
    ]


def studies(found: dict[str, dict[str, Any] | None]) -> list[str]:
    """How each study is run, and what it took."""
    rows: list[list[str]] = []
    for name, results in found.items():
        if results is None:
            rows.append([f"`{name}`", f"`diptych study {name} --jobs 2`", "not run yet", "-", "-"])
            continue
        bench = results["bench"]
        passes = "-" if bench is None or bench["passes"] is None else "passes" if bench["passes"] else "does not pass"
        hours, hardware = f"{reports.hours(results):.1f}", "; ".join(results["hardware"])
        rows.append([f"`{name}`", f"`diptych study {name}{only(results)} --jobs 2`", hours, hardware, passes])
    return md.table(["study", "command", "hours, one run at a time", "hardware", "bench"], rows)


def only(results: Mapping[str, Any]) -> str:
    """The options of a study of which some rows were performed, or some seeds; nothing for a whole one."""
    if results["complete"]:
        return ""
    done = {name: sorted(int(seed) for seed in row["seeds"]) for name, row in results["runs"].items() if row["seeds"]}
    seeds = sorted({seed for each in done.values() for seed in each})
    return f" --rows {' '.join(done)} --seeds {' '.join(map(str, seeds))}"


def pictures(found: dict[str, dict[str, Any] | None]) -> Iterator[str]:
    """The plots of every study that was run."""
    for name, results in found.items():
        if results is not None:
            yield from (
                f"![{results['title']}: {text}](images/{file})\n" for file, text in plots_of(name, results).items()
            )


def plots_of(name: str, results: dict[str, Any]) -> dict[str, str]:
    """A study's plots, by the names of their files."""
    drawn = ["plot.png", *(["curve.png"] if results["curve"] is not None else [])]
    drawn += ["steps.png"] if reports.scored_while_trained(results) else []
    return {f"evidence_{name}_{plot}": PLOTS[plot].lower() for plot in drawn}


def draw(name: str, results: dict[str, Any]) -> None:
    """Write a study's plots."""
    making = {"plot.png": reports.plot, "curve.png": reports.curve, "steps.png": reports.steps}
    for file in plots_of(name, results):
        making[file.rpartition("_")[2]](results, IMAGES / file)


def section(found: dict[str, dict[str, Any] | None]) -> str:
    """What stands between the marks."""
    bench = [f"{name}: {reports.bench_line(each['bench'])}" for name, each in found.items() if each and each["bench"]]
    return "\n".join(
        [*claims(found), "", *studies(found), "", *bench, *([""] if bench else []), *pictures(found)]
    ).rstrip()


def page() -> str:
    """The whole of docs/evidence.md with the section anew."""
    found = {name: results_of(name) for name in study.names()}
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    return f"{before}{BEGIN}\n\n{section(found)}\n\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    for study_name in study.names():
        if (of_study := results_of(study_name)) is not None:
            draw(study_name, of_study)
    PAGE.write_text(page(), encoding="utf-8")
