"Each notebook is a test. Beside running them: are they clean, and is what is generated from them up to date?"
import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from execnb.nbio import nb2str, read_nb
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.test import test_nb as run_nb

cfg = get_config()
notebooks = pytest.mark.parametrize("nb", sorted(cfg.nbs_path.glob("*.ipynb")), ids=lambda p: p.stem)


@notebooks
def test_runs(nb):
    ok, _ = run_nb(nb, skip_flags=cfg.tst_flags.split(), basepath=cfg.config_path)
    assert ok


@notebooks
def test_clean(nb):
    want = read_nb(nb)
    clean_nb(want)
    assert nb.read_text() == nb2str(want), "run nbdev_clean"


def test_exported(tmp_path):
    shutil.copytree(cfg.nbs_path, tmp_path / "nbs")
    shutil.copy(cfg.config_file, tmp_path)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}  # under it nbdev_export does nothing, silently
    export = Path(sys.executable).with_name("nbdev_export")  # .venv/bin need not be on PATH
    subprocess.run([export], cwd=tmp_path, env=env, check=True)
    same = filecmp.dircmp(cfg.lib_path, tmp_path / cfg.lib_path.name, ignore=["__pycache__"])
    assert not (same.diff_files or same.left_only or same.right_only), "run nbdev_export"


def test_readme():
    from tools.nbs import readme

    assert (cfg.config_path / "README.md").read_text() == readme(cfg.nbs_path / cfg.readme_nb, cfg.nbs_path / "images")


def test_masking_imports_only_what_it_needs():
    heavy = "gradio accelerate av matplotlib"
    code = f"import sys, mgm_nb.masking; print([m for m in {heavy.split()!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
