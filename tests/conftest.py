"""How `pytest -n` deals the tests to its processes: a module to one, for its fixtures; every notebook by itself.

The longest go first, lest one process be left with a long rest. The app's tests start servers and a browser: one group.
"""
import re

from xdist.scheduler import LoadScopeScheduling

LONGEST = ["app", "nbs", "train", "evaluate", "extract", "videomae"]  # then the others


def module(nodeid: str) -> str: return re.search(r"test_(\w+)\.py", nodeid)[1].replace("browser", "app")


class Groups(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        "Tests of one name stay together, in their order (marks for --dist loadgroup are lost on pytest 9.2)"
        notebook = re.search(r"test_nbs\.py.*\[(\w+)\]", nodeid)
        return notebook[1] if notebook else module(nodeid)


def pytest_xdist_make_scheduler(config, log): return Groups(config, log)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: (LONGEST + [module(item.nodeid)]).index(module(item.nodeid)))
