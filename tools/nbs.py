"Keep the notebooks' outputs, and the README made from them, fresh."
import os
from base64 import b64decode
from pathlib import Path

from execnb.nbio import write_nb
from execnb.shell import CaptureShell
from fastcore.script import call_parse
from fastcore.xtras import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import NBProcessor

cfg = get_config()


def run(path: Path, skip: set[str]):
    "Execute `path` as `nbdev_test` does, saving outputs; a skipped cell keeps the ones it has"
    nb = NBProcessor(path, rm_directives=False).nb

    def skipped(cell):
        return cell.cell_type != "code" or cell.directives_.get("eval:") == ["false"] or skip & cell.directives_.keys()

    for cell in nb.cells:
        if not skipped(cell): cell.outputs = []
    with working_directory(path.parent):
        CaptureShell(path, mpl_format="png").run_all(nb, exc_stop=True, preproc=skipped)
    clean_nb(nb)
    write_nb(nb, path)


def readme(path: Path, images: Path) -> str:
    "The notebook at `path` as Markdown; pictures go under `images`"
    parts = []
    for cell in NBProcessor(path).nb.cells:
        if "hide" in cell.directives_: continue
        if cell.cell_type == "markdown": parts.append(cell.source)
        elif cell.directives_.get("echo:") != ["false"]: parts.append(f"```python\n{cell.source}\n```")
        for out in cell.get("outputs", []):
            data = out.get("data", {})
            if "image/png" in data:
                images.mkdir(exist_ok=True)
                png = images / f"{cell.id}.png"
                png.write_bytes(b64decode(data["image/png"]))
                parts.append(f"![]({png.relative_to(cfg.config_path)})")
            elif "text/markdown" in data: parts.append("".join(data["text/markdown"]))
            else: parts.append("```\n" + "".join(data.get("text/plain") or out.get("text", "")).rstrip() + "\n```")
    return "\n\n".join(parts) + "\n"


@call_parse
def main(
    nb: str = None,  # one notebook (default: all of them)
    flags: str = "",  # test flags to run as well, e.g. "slow cuda"
):
    "Refresh the outputs of the notebooks, then README.md"
    os.environ["IN_TEST"] = "1"
    skip = set(cfg.tst_flags.split()) - set(flags.split())
    for path in [Path(nb).absolute()] if nb else sorted(cfg.nbs_path.glob("*.ipynb")): run(path, skip)
    index = cfg.nbs_path / cfg.readme_nb
    if index.exists(): (cfg.config_path / "README.md").write_text(readme(index, cfg.nbs_path / "images"))
