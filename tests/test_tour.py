"""docs/tour.ipynb runs from its first cell to its last and draws what it shows.

It is run without Jupyter: `python tests/test_tour.py` does so, and stores the outputs in it.
"""

import ast
import base64
import io
import json
import os
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

TOUR = Path(__file__).parents[1] / "docs" / "tour.ipynb"


def run_notebook(notebook: dict[str, Any]) -> None:
    """Runs its code cells in one namespace; what they print and their last lines' values become their outputs."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for count, cell in enumerate(code_cells(notebook), 1):
        tree, printed, value = ast.parse("".join(cell["source"])), io.StringIO(), None
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        with redirect_stdout(printed):
            exec(compile(tree, f"cell {count}", "exec"), namespace)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), f"cell {count}", "eval"), namespace)
        text = printed.getvalue().splitlines(keepends=True)
        outputs: list[dict[str, Any]] = [{"name": "stdout", "output_type": "stream", "text": text}] if text else []
        if value is not None:
            outputs.append(
                {"data": shown(value), "execution_count": count, "metadata": {}, "output_type": "execute_result"}
            )
        cell.update(execution_count=count, outputs=outputs)


def shown(value: Any) -> dict[str, Any]:
    """As Jupyter shows it, an image as PNG."""
    if not isinstance(value, Image.Image):
        return {"text/plain": repr(value).splitlines(keepends=True)}
    file = io.BytesIO()
    value.save(file, "PNG", optimize=True)
    return {"image/png": base64.b64encode(file.getvalue()).decode(), "text/plain": [f"<image of {value.size}>"]}


def code_cells(notebook: dict[str, Any]) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def pictures(notebook: dict[str, Any]) -> list[Image.Image | None]:
    """Of each code cell the picture, where it has one."""
    found: list[Image.Image | None] = []
    for cell in code_cells(notebook):
        data = [output["data"]["image/png"] for output in cell["outputs"] if "image/png" in output.get("data", {})]
        found.append(Image.open(io.BytesIO(base64.b64decode(data[0]))) if data else None)
    return found


def test_the_tour_runs_and_draws_what_is_stored(tmp_path: Path) -> None:
    fresh = tmp_path / "tour.ipynb"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    result = subprocess.run([sys.executable, __file__, fresh], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    stored, drawn = (pictures(json.loads(path.read_text(encoding="utf-8"))) for path in (TOUR, fresh))
    assert len(drawn) == len(stored) and sum(picture is not None for picture in drawn) >= 12
    for index, (old, new) in enumerate(zip(stored, drawn, strict=True)):
        assert (old is None) == (new is None), f"code cell {index}: run `python tests/test_tour.py`"
        if old is not None and new is not None:
            assert new.size == old.size and np.asarray(new.convert("L")).std() > 5, f"code cell {index} is blank"


def test_the_stored_tour_is_small_enough_for_a_page() -> None:
    assert TOUR.stat().st_size < 1_000_000


if __name__ == "__main__":
    output = Path(sys.argv[1] if len(sys.argv) > 1 else TOUR).absolute()
    os.chdir(TOUR.parent)
    tour = json.loads(TOUR.read_text(encoding="utf-8"))
    run_notebook(tour)
    output.write_text(json.dumps(tour, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
