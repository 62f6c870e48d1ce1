"A comparison can be stopped anywhere and is never computed twice; its numbers are of the runs it names."
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from mgm_nb import experiment
from mgm_nb.cli import main
from mgm_nb.experiment import PRESETS, experiment_table, paired, read_runs, run_experiment


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = replace(PRESETS["smoke"], out=str(tmp_path_factory.mktemp("experiment")))
    assert main(["experiment", "--config", "smoke", "--out", config.out]) == 0
    return config


def test_smoke_ends_with_a_table_and_a_plot(finished, capsys):
    assert main(["experiment", "--config", "smoke", "--out", finished.out]) == 0  # nothing is left to do: it only tells
    told = capsys.readouterr().out
    assert experiment_table(read_runs(finished.out)) in told
    with Image.open(told.split()[-1]) as picture: assert min(picture.size) > 400
    runs = read_runs(finished.out)
    assert [(r["arm"], r["seed"]) for r in runs] == [(a, s) for s in finished.seeds for a in finished.arms]
    for run in runs:
        assert [s["epochs"] for s in run["scores"]] == ([0] if run["arm"] == "untrained" else [1, 2])
        assert all(0 <= v <= 1 for s in run["scores"] for k, v in s.items() if k not in ("epochs", "TFLOPs"))
    table = experiment_table(runs).splitlines()
    assert len(table) == 2 + 3 + 1 and table[-1].startswith("| chance") and "12.5" in table[-1]


def test_same_seed_same_scores(finished, tmp_path):
    runs = {(r["arm"], r["seed"]): r["scores"] for r in read_runs(finished.out)}
    sets = experiment.make_world(finished)
    again = experiment.run_arm(replace(finished, out=str(tmp_path)), "mgm", 1, sets)
    assert again["scores"] == runs["mgm", 1] and again["scores"] != runs["mgm", 0]


def test_a_killed_run_is_repeated_and_a_finished_one_is_not(finished, monkeypatch):
    file, before = experiment.Path(finished.out) / "runs.jsonl", read_runs(finished.out)
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]) + lines[-1][:40])  # killed while it wrote the last line
    (experiment.Path(finished.out) / "running" / "mgm 1").mkdir(parents=True)  # and left its folder
    made, run_arm = [], experiment.run_arm

    def note(config, name, seed, *rest):
        made.append((name, seed))
        return run_arm(config, name, seed, *rest)

    monkeypatch.setattr(experiment, "run_arm", note)
    run_experiment(finished, progress=False)
    assert made == [("mgm", 1)]
    assert [r["scores"] for r in read_runs(finished.out)] == [r["scores"] for r in before]


def test_other_settings_are_refused(finished):
    with pytest.raises(ValueError, match="lr.*another folder"): run_experiment(replace(finished, lr=1.0), False)
    with pytest.raises(ValueError, match="no elephant; there are untrained"):
        run_experiment(replace(finished, arms=("elephant",)), False)


def test_paired_differences_are_of_equal_seeds():
    def run(arm, seed, score):
        return {"arm": arm, "seed": seed, "scores": [{"epochs": 1, "x": 0.0}, {"epochs": 2, "x": score}]}

    runs = [run("a", 0, 0.5), run("a", 1, 0.7), run("a", 2, 0.9), run("b", 2, 0.5), run("b", 0, 0.4), run("b", 1, 0.4)]
    mean, half, differences = paired(runs, "a", "b", "x")
    np.testing.assert_allclose(differences, [0.1, 0.3, 0.4])
    np.testing.assert_allclose([mean, half], [0.8 / 3, 4.3027 * np.std(differences, ddof=1) / np.sqrt(3)], rtol=1e-4)
    assert paired(runs, "a", "b", "x", epochs=1)[0] == 0 and np.isnan(paired(runs[:1], "a", "b", "x")[0])
