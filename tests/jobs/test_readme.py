"""The README's scripts run as they stand."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize(
    ("block", "says"),
    [(0, "7 batches; torch.Size([16, 2])"), (1, "7 batches in all"), (2, "7 batches, in dataset order")],
)
def test_readme_script(runner, tmp_path, block, says):
    script = tmp_path / "script.py"
    script.write_text(BLOCKS[block])
    process = runner.start(str(script))
    code = runner.wait(process, 120)
    text = runner.log_of(process)
    assert code == 0, text
    assert says in text
    assert len(BLOCKS) == 3
