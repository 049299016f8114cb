"""What the README shows must run as it stands, and every file it points to must exist."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

import qquant
from tests.conftest import make_checkpoint
from tests.make_qwen_v1 import make_qwen_v1

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "reports").rglob("*.md"))]


@pytest.mark.slow  # quantizes and evaluates
def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    make_checkpoint(tmp_path / "my-qwen", hidden_size=128, intermediate_size=256, num_hidden_layers=1)
    make_qwen_v1(tmp_path / "Qwen-7B-Chat")
    turns = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello, what can I do for you?"}]
    chats = [{"id": str(i), "conversations": turns} for i in range(4)]
    (tmp_path / "train.json").write_text(json.dumps(chats))
    monkeypatch.chdir(tmp_path)
    # register() is for a whole process; the other tests want transformers as it was.
    monkeypatch.setitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "gptq", AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"])
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)  # our own text
    assert type(names["model"].model.layers[0].mlp.up_proj).__name__ == "QuantLinear"  # type: ignore[attr-defined]
    assert names["history"] == [("你好", names["response"])]
    assert isinstance(qquant.load_quantized("my-qwen-int4-too").config.quantization_config.to_dict()["bits"], int)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_of_a_page_leads_to_a_file(page: Path) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))
    missing = [link for link in links if not (page.parent / link).exists()]
    assert missing == []
