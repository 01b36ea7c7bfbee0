"""The Python in docs/drop-in.md and in the README's section on Diffusers runs, on the built-in model."""

import re
from pathlib import Path

import pytest

from frameloom import shapes

ROOT = Path(__file__).parents[2]
PAGES = {"docs/drop-in.md": "# In a Diffusers pipeline", "README.md": "## In a Diffusers pipeline"}
HUB = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("page", PAGES)
def test_the_python_of_a_page_runs(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert PAGES[page] in text
    section = text.partition(PAGES[page])[2].partition("\n## " if page == "README.md" else "\0")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, flags=re.S)
    assert any(HUB in block for block in blocks)
    code = "\n".join(blocks).replace(HUB, str(shapes.PATH)).replace("num_frames=81", "num_frames=5")
    exec(compile(code, page, "exec"), found := {})  # noqa: S102 - that it runs is what is claimed
    assert tuple(found["frames"].shape[1:]) in ((17, 3, 64, 64), (5, 3, 64, 64))
    shown = capsys.readouterr().out
    assert re.search(r"^vae +AutoencoderKLWan +taken ", shown, flags=re.M)
    assert re.search(r"^transformer +WanTransformer3DModel +taken ", shown, flags=re.M)
