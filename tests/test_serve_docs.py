"""docs/serving.md does what it says: its shell and Python examples run against a server."""

from __future__ import annotations

import doctest
import re
import subprocess

import pytest

from .patience import PATIENCE
from .serving import ROOT, server

for name in ("uvicorn", "llguidance", "openai"):
    pytest.importorskip(name)
PAGE = (ROOT / "docs" / "serving.md").read_text()
HERE = "http://127.0.0.1:8080"


@pytest.mark.long
def test_the_examples_of_the_page_run():
    command = re.search(r"^python -m minioscar serve (.*)$", PAGE, re.M)[1]
    with server(*command.split()) as one:
        url = one.url.removesuffix("/v1")
        shell = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, re.S))
        command = ["bash", "-ec", shell.replace(HERE, url)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert done.returncode == 0 and '"error"' not in done.stdout, done.stdout
        for said in ("The capital of France is Paris.", "data: [DONE]", '"text_offset"', "max_model_len", "# TYPE"):
            assert said in done.stdout
        python = "\n".join(re.findall(r"```python\n(.*?)```", PAGE, re.S)).replace(HERE, url)
        examples = doctest.DocTestParser().get_doctest(python, {}, "serving.md", "serving.md", 0)
        assert len(examples.examples) > 15
        said: list[str] = []
        assert doctest.DocTestRunner().run(examples, out=said.append).failed == 0, "".join(said)
