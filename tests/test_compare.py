"""Runs side by side: what is an entry, what is the same row, verdicts, notes, and what is left out."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import pytest
from PIL import Image

import compared
import vlmtune
from test_cli import SOURCE, refused, script
from vlmtune import comparison
from vlmtune.comparison.plots import is_logarithmic
from vlmtune.config import compose
from vlmtune.config.trial_names import short_keys
from vlmtune.data.fingerprint import content
from vlmtune.data.images import open_image
from vlmtune.data.table import load
from vlmtune.errors import ConfigError, DataError, VlmtuneError
from vlmtune.record.outputs import as_cells
from vlmtune.record.runfolder import frame_of, write_table

IMAGES, ROWS = 40, 3
EQUAL = compared.answered(IMAGES, ROWS, 0.8, seed=0)
WORSE = [right and number % 3 > 0 for number, right in enumerate(EQUAL)]


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return compared.write_table(tmp_path / "data", IMAGES, ROWS)


def verdicts(found: comparison.Comparison) -> dict[str, str]:
    return {entry.name: entry.scores[found.metrics[0]].verdict for entry in found.entries}


def rewrite(run: Path, change: dict[str, str], rows: int | None = None) -> None:
    """Change columns of the first row, and keep so many rows."""
    path = run / "predictions.csv"
    with path.open(newline="") as file:
        found = list(csv.DictReader(file))[:rows]
    found[0] |= change
    with path.open("w", newline="") as out:
        writer = csv.DictWriter(out, list(found[0]))
        writer.writeheader()
        writer.writerows(found)


# ---------------------------------------------------------------- verdicts


def test_a_worse_run_is_found_and_a_copy_ties(tmp_path: Path, table: Path) -> None:
    runs = [
        compared.write_run(tmp_path / name, table, right)
        for name, right in zip("abc", (EQUAL, WORSE, EQUAL), strict=True)
    ]
    found = comparison.compare(runs)
    assert verdicts(found) == {"a": "best", "c": "tie", "b": "worse"}
    first, copy, worse = (entry.scores["exact_match"] for entry in found.entries)
    assert first.mean == pytest.approx(sum(EQUAL) / len(EQUAL))
    assert (copy.difference, copy.difference_low, copy.difference_high, copy.p, copy.mcnemar) == (0, 0, 0, 1, 1)
    assert worse.difference_low < worse.difference < worse.difference_high < 0
    assert worse.p < 0.05
    assert worse.mcnemar == pytest.approx(2 ** (1 - sum(EQUAL) + sum(WORSE)))  # only the other is ever right alone
    assert (len(found.rows), found.images) == (IMAGES * ROWS, IMAGES)


def test_other_metrics_are_computed_from_the_same_answers(tmp_path: Path, table: Path) -> None:
    runs = [compared.write_run(tmp_path / name, table, right) for name, right in (("a", EQUAL), ("b", WORSE))]
    found = comparison.compare(runs)
    assert found.metrics == ["exact_match", "anls"]
    assert found.entries[0].scores["anls"].mean == found.entries[0].scores["exact_match"].mean  # "no" is never near
    assert comparison.compare(runs, metric="token_f1").metrics == ["token_f1", "exact_match", "anls"]
    with pytest.raises(ConfigError, match="metric=anl: did you mean anls"):
        comparison.compare(runs, metric="anl")


def test_the_same_seed_gives_the_same_numbers(tmp_path: Path, table: Path) -> None:
    near = compared.answered(IMAGES, ROWS, 0.75, seed=7)
    runs = [compared.write_run(tmp_path / name, table, right) for name, right in (("a", EQUAL), ("b", near))]
    first, again, other = (comparison.compare(runs, seed=seed).entries[1].scores for seed in (0, 0, 1))
    assert first == again != other
    wide = comparison.compare(runs, confidence=0.99).entries[1].scores["exact_match"]
    assert wide.low < first["exact_match"].low
    assert wide.high > first["exact_match"].high


# ---------------------------------------------------------------- entries


def test_runs_that_differ_in_their_seed_are_one_entry(tmp_path: Path, table: Path) -> None:
    """The mean of three seeds, and how far they lie apart; sweep.json says what was swept."""
    grid = [(r, seed) for r in (4, 8) for seed in (0, 1, 2)]
    words = [[f"adapter.r={r}", f"trainer.seed={seed}"] for r, seed in grid]
    compared.write_sweep(tmp_path / "sweep", words)
    shares = {4: 0.6, 8: 0.9}
    answers = [compared.answered(IMAGES, ROWS, shares[r], seed=10 + seed) for r, seed in grid]
    for number, (own, right) in enumerate(zip(words, answers, strict=True)):
        compared.write_run(tmp_path / "sweep" / str(number), table, right, own, metrics={"test/exact_match": 0.5})
    found = comparison.compare([tmp_path / "sweep"])
    assert verdicts(found) == {"3+4+5": "best", "0+1+2": "worse"}
    assert found.keys == ["adapter.r"]
    score = found.entries[0].scores["exact_match"]
    means = [sum(right) / len(right) for right in answers[3:]]
    assert score.mean == pytest.approx(sum(means) / 3)
    assert score.spread == pytest.approx((sum((m - sum(means) / 3) ** 2 for m in means) / 2) ** 0.5)
    assert score.mcnemar is None
    assert "on the test rows it has 0.5000" in " ".join(found.notes)
    assert "seed" not in " ".join(found.notes)


def test_seeds_that_hold_out_other_rows_are_compared_on_all_of_them(tmp_path: Path, table: Path) -> None:
    runs = []
    for r, right in ((4, EQUAL), (8, WORSE)):
        for seed in (0, 1):
            words = [f"adapter.r={r}", f"trainer.seed={seed}"]
            runs.append(compared.write_run(tmp_path / f"{r}_{seed}", table, right, words))
            with (runs[-1] / "predictions.csv").open(newline="") as file:
                header, *rows = file.readlines()
            (runs[-1] / "predictions.csv").write_text("".join([header, *rows[60 * seed : 60 * seed + 60]]))
    found = comparison.compare(runs)
    assert verdicts(found) == {"4_0+4_1": "best", "8_0+8_1": "worse"}
    assert found.entries[0].scores["exact_match"].mean == pytest.approx(sum(EQUAL) / len(EQUAL))


def test_the_keys_of_runs_without_a_sweep_are_those_of_their_configs(tmp_path: Path, table: Path) -> None:
    one = compared.write_run(tmp_path / "one" / "stamp", table, EQUAL, ["adapter.r=4", "tracker=none"])
    two = compared.write_run(tmp_path / "two" / "stamp", table, WORSE, ["adapter.r=8", "trainer.learning_rate=1e-3"])
    found = comparison.compare([one, two, one])
    assert found.keys == ["adapter.r", "trainer.learning_rate"]
    assert [(entry.name, entry.swept["adapter.r"]) for entry in found.entries] == [
        ("one/stamp", "4"),
        ("two/stamp", "8"),
    ]
    assert "r=4 lr=0.003" in comparison.page.label(found.entries[0], found)


def test_short_names_stay_apart() -> None:
    keys = ["adapter.r", "trainer.scheduler.name", "optimizer.name"]
    assert short_keys(keys) == ["r", "scheduler.name", "optimizer.name"]


# ---------------------------------------------------------------- rows


def test_other_rows_are_refused_and_named(tmp_path: Path, table: Path) -> None:
    runs = [compared.write_run(tmp_path / name, table, EQUAL) for name in "ab"]
    rewrite(runs[1], {"question": "What else?"})
    with pytest.raises(DataError, match=r"a and .*b: were not evaluated on the same rows \(120 and 120\).*What else\?"):
        comparison.compare(runs)
    compared.write_run(tmp_path / "c", table, EQUAL)
    rewrite(tmp_path / "c", {}, rows=100)
    with pytest.raises(DataError, match=r"\(120 and 100\).*data.max_eval_rows"):
        comparison.compare([runs[0], tmp_path / "c"])


def test_rows_may_come_in_another_order_and_from_another_folder(tmp_path: Path, table: Path) -> None:
    runs = [compared.write_run(tmp_path / name, table, EQUAL) for name in "ab"]
    with (runs[1] / "predictions.csv").open(newline="") as file:
        header, *rows = file.read().splitlines()
    moved = [f"/elsewhere/{row}" for row in reversed(rows)]
    (runs[1] / "predictions.csv").write_text("\n".join([header, *moved]) + "\n")
    assert comparison.compare(runs).entries[1].scores["exact_match"].mcnemar == 1


def test_rows_without_images_are_taken_one_by_one(tmp_path: Path, table: Path) -> None:
    runs = [compared.write_run(tmp_path / name, table, EQUAL) for name in "ab"]
    for run in runs:
        (run / "predictions.csv").write_text(re.sub(r"images/\d+.png", "", (run / "predictions.csv").read_text()))
    found = comparison.compare(runs)
    assert found.images == IMAGES * ROWS
    assert "each is taken as independent" in " ".join(found.notes)


def test_images_in_memory_are_told_apart_in_predictions() -> None:
    import pandas as pd

    red, again, blue = (
        Image.new("RGB", (4, 4), "red"),
        Image.new("RGB", (4, 4), "red"),
        Image.new("RGB", (4, 4), "blue"),
    )
    cells = list(as_cells(pd.DataFrame({"image": [red, again, blue, b"\xff\xd8"]}))["image"])
    assert cells[0] == cells[1] == f"<image {content(red).hex()}>"
    assert len(set(cells)) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [({"score": "x"}, "row 1 has no score"), ({"score": ""}, "row 1 has no score")],
)
def test_a_damaged_file_is_named(tmp_path: Path, table: Path, change: dict[str, str], message: str) -> None:
    run = compared.write_run(tmp_path / "a", table, EQUAL)
    rewrite(run, change)
    with pytest.raises(DataError, match=message):
        comparison.compare([run])


# ---------------------------------------------------------------- images of rows


DRAWN = "vlmtune.data.sources.drawn.courses.load_see"


@pytest.mark.parametrize(("target", "shown"), [(DRAWN, True), ("somebody.elses.load", False)])
def test_images_that_are_no_files_come_from_the_source(tmp_path: Path, target: str, shown: bool) -> None:
    """From vlmtune's own sources; a run folder of somebody else makes no code run."""
    config, _ = compose.read("train", [f"data._target_={DRAWN}", "data.max_eval_rows=4"])
    split = load(config.data, config.task, 0, ("validation",))["validation"]
    frame = frame_of(split).assign(answer_predictions="no", score=0.0)
    run = compared.write_config(tmp_path / "run", [f"data._target_={target}", "data.max_eval_rows=4"])
    write_table(run / "predictions.csv", frame)
    compared.write_result(run, objective=0.0, metrics={})
    [entry] = comparison.compare([run]).entries
    picture = entry.rows[0].image(2)
    assert (picture is not None) is shown
    if shown:
        assert picture.tobytes() == open_image(split.records[2].images[0], 10**6).tobytes()


def test_relative_images_of_several_tables_are_those_of_each(tmp_path: Path) -> None:
    """`images/0.png` in two folders is two pictures."""
    tables = [compared.write_table(tmp_path / name, 2, 1) for name in ("one", "two")]
    Image.new("RGB", (48, 32), "black").save(tmp_path / "two" / "images" / "0.png")
    both = f"data.validation=[{tables[0]},{tables[1]}]"
    run = compared.write_run(tmp_path / "run", tables[0], [True, True], [both])
    lines = (run / "predictions.csv").read_text().splitlines()
    (run / "predictions.csv").write_text("\n".join([*lines, *lines[1:]]) + "\n")
    [entry] = comparison.compare([run]).entries
    colours = [entry.rows[0].image(place).getpixel((5, 5)) for place in range(4)]
    assert colours == [(255, 0, 0), (0, 128, 0), (0, 0, 0), (0, 128, 0)]


def test_two_real_runs(tmp_path: Path) -> None:
    words = ["tracker=none", "trainer.max_steps=2", "data.max_train_rows=32", "data.max_eval_rows=24"]
    words += ["trainer.eval_baseline=false", "trainer.save_every=null"]
    made = [vlmtune.train([*words, f"adapter.r={r}", f"hydra.run.dir={tmp_path / str(r)}"]) for r in (2, 4)]
    found = comparison.compare([tmp_path / "2", tmp_path / "4"])
    assert found.keys == ["adapter.r"]
    means = {entry.name: entry.scores["exact_match"].mean for entry in found.entries}
    assert means == pytest.approx({"2": made[0]["objective"], "4": made[1]["objective"]})
    assert (len(found.rows), 1 < found.images < 24) == (24, True)
    assert found.entries[0].rows[0].image(0).size == (64, 64)
    page = comparison.write(tmp_path / "compare.html", found).read_text()
    assert "exact_match by training time" in page


# ---------------------------------------------------------------- what is left out


def half_done(tmp_path: Path, table: Path) -> Path:
    """Two results, a failure of each of two kinds, one trial that runs, and one that has not begun."""
    sweep = tmp_path / "adapter.r" / "stamp"
    compared.write_sweep(sweep, [[f"adapter.r={r}"] for r in (4, 8, 16, 32, 64, 128)])
    compared.write_run(sweep / "0", table, WORSE, ["adapter.r=4"])
    compared.write_run(sweep / "1", table, EQUAL, ["adapter.r=8"])
    compared.write_failure(sweep / "2", "killed", "killed by SIGKILL")
    compared.write_failure(sweep / "3", "not_finite", "the loss is NaN at step 3")
    compared.write_run(sweep / "4", table, EQUAL, ["adapter.r=64"])
    (sweep / "4" / "result.json").unlink()
    return sweep


def test_a_half_done_sweep_has_a_table_and_a_page(tmp_path: Path, table: Path) -> None:
    sweep = half_done(tmp_path, table)
    said = comparison.finish(sweep)
    assert said.endswith(str(sweep / "compare.html"))
    assert [run.name for run, _ in comparison.compare([sweep]).left_out] == ["2", "3", "4", "5"]
    for line in (
        "2: failed: killed: killed by SIGKILL",
        "3: failed: not_finite: the loss",
        "4: unfinished",
        "5: waiting",
    ):
        assert line in said
    assert [line.split()[0] for line in said.splitlines() if line.startswith(("0 ", "1 "))] == ["1", "0"]


@pytest.mark.parametrize("trials", ["failed", "one", "none", "damaged"])
def test_the_end_of_a_sweep_never_raises(tmp_path: Path, table: Path, trials: str) -> None:
    sweep = tmp_path / "sweep"
    compared.write_sweep(sweep, [["adapter.r=4"]] if trials != "none" else [])
    if trials == "failed":
        compared.write_failure(sweep / "0", "data", "no such file")
    elif trials == "one":
        compared.write_run(sweep / "0", table, EQUAL)
    elif trials == "damaged":
        (sweep / "sweep.json").write_text("{")
    said = comparison.finish(sweep)
    expected = {
        "failed": "No run to compare yet",
        "one": "best",
        "none": "has neither a run",
        "damaged": "sweep.json: is damaged",
    }
    assert expected[trials] in said
    assert (sweep / "compare.html").exists() is (trials in ("failed", "one"))


@pytest.mark.parametrize("name", ["result.json", "config.yaml"])
def test_a_damaged_trial_hides_no_other(tmp_path: Path, table: Path, name: str) -> None:
    sweep = half_done(tmp_path, table)
    (sweep / "0" / name).write_text("{")
    found = comparison.compare([sweep])
    assert verdicts(found) == {"1": "best"}
    assert f"{name}: is damaged" in found.left_out[0][1]


def test_folders_that_are_no_runs_are_refused(tmp_path: Path, table: Path) -> None:
    with pytest.raises(VlmtuneError, match="gone: not found; name the folder of a run or of a sweep"):
        comparison.compare([tmp_path / "gone"])
    with pytest.raises(VlmtuneError, match="data: has neither a run"):
        comparison.compare([table.parent])


def test_the_best_of_several_comes_with_a_warning(tmp_path: Path, table: Path) -> None:
    runs = [compared.write_run(tmp_path / name, table, right) for name, right in (("a", EQUAL), ("b", WORSE))]
    [biased, seeds] = comparison.compare(runs).notes
    assert "a is the best of 2" in biased
    assert f"evaluate run={runs[0]} data.test=FILE" in biased
    assert "trainer.seed=0,1,2" in seeds
    assert comparison.compare(runs[:1]).notes == []


# ---------------------------------------------------------------- the command


def test_the_command_prints_the_table_and_writes_the_page(tmp_path: Path, table: Path) -> None:
    sweep = half_done(tmp_path, table)
    done = script("compare", str(sweep), "metric=anls", "confidence=0.9", folder=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "anls on 120 rows about 40 images" in done.stdout
    assert "90 %" in done.stdout
    assert done.stdout.splitlines()[-1].split() == ["page", str(sweep / "compare.html")]
    both = script("compare", f"{sweep}/0", f"{sweep}/1", "output=mine.html", folder=tmp_path)
    assert (both.returncode, (tmp_path / "mine.html").exists()) == (0, True)
    assert json.loads((sweep / "sweep.json").read_text())["name"] == "stamp"  # run folders are only read


def test_the_command_has_help(tmp_path: Path) -> None:
    done = script("compare", "--help", folder=tmp_path, python=("-X", "importtime"))
    assert f"python {SOURCE}/compare.py outputs/sweeps/NAME/STAMP" in done.stdout
    assert not {"torch", "pandas", "numpy"} & {line.rsplit("|", 1)[-1].strip() for line in done.stderr.splitlines()}


def test_another_page_is_not_replaced(tmp_path: Path, table: Path) -> None:
    run = compared.write_run(tmp_path / "run", table, EQUAL)
    (tmp_path / "compare.html").write_text("my own")
    refused(
        script("compare", str(run), folder=tmp_path),
        1,
        "config error: compare.html: is not an earlier page of comparisons; name another file",
    )
    assert [script("compare", str(run), "output=a.html", folder=tmp_path).returncode for _ in range(2)] == [0, 0]


def test_the_commands_mistakes_are_answered(tmp_path: Path) -> None:
    refused(
        script("compare", "confidence=2", "model=pico", folder=tmp_path),
        1,
        "config error: 2 problems",
        "  - model: no such key; choose from: confidence, metric, output, runs, seed",
        "  - confidence=2.0: must be at least 0.5 and at most 0.999",
    )
    done = script("compare", "output=a.txt", "metrc=anls", folder=tmp_path)
    assert "metrc: no such key; did you mean metric?" in done.stderr
    assert "no folder is named; for instance python" in done.stderr
    assert "output=a.txt: must end in .html" in done.stderr
    refused(
        script("compare", "gone", folder=tmp_path),
        1,
        "config error: gone: not found; name the folder of a run or of a sweep",
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([4, 8, 16], True),
        ([1e-5, 1e-4, 1e-3], True),
        ([1e-4, 2e-4], False),
        ([1, 100], True),
        ([0.1, 0.2, 0.3], False),
        ([0, 8, 16], False),
        ([7], False),
    ],
)
def test_axes_are_logarithmic_where_the_values_are(values: list[float], expected: bool) -> None:
    assert is_logarithmic(values) is expected
