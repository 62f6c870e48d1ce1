"What tests of trainings share."
from contextlib import contextmanager

import pytest

from mgm_nb import loop
from mgm_nb.checkpoints import load_checkpoint
from mgm_nb.loop import find_checkpoint


def weights(run): return load_checkpoint(find_checkpoint(run)).state_dict()


def same(a, b): return a.keys() == b.keys() and all(a[k].equal(b[k]) for k in a)


@contextmanager
def ended_at(monkeypatch, last):
    "What trains in here is interrupted right after the checkpoint of step `last`"
    save = loop.save_step

    def crash(run, step, *rest):
        save(run, step, *rest)
        if step == last: raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "save_step", crash)
        yield
