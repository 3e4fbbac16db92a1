"""What a host of the repository runs and asks is what this checkout has: workflow, hooks, templates."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

import forks

ROOT = Path(__file__).parents[2]


def read(file: str) -> Any:
    return yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))


def test_the_workflow_runs_ci_run_and_nothing_else() -> None:
    (job,) = read(".github/workflows/ci.yml")["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == ["bash .ci/run"]
    versions = [step["with"]["python-version"] for step in job["steps"] if "python-version" in step.get("with", {})]
    (oldest,) = re.findall(r"python_requires = >=(\S+)", (ROOT / "setup.cfg").read_text(encoding="utf-8"))
    assert versions == [oldest]


def test_the_first_hook_is_the_check_of_ci_and_the_others_write_the_pages_that_are_made() -> None:
    (repo,) = read(".pre-commit-config.yaml")["repos"]
    assert repo["repo"] == "local"
    entries = {hook["id"]: hook["entry"] for hook in repo["hooks"]}
    assert entries["check"] == "bash scripts/check.sh --fix"
    assert "bash scripts/check.sh\n" in (ROOT / ".ci/run").read_text(encoding="utf-8")
    pages = [re.findall(r"(scripts/docs/\w+\.py) --write (docs/\w+\.md)", entry) for entry in entries.values()]
    made = [("scripts/docs/config_docs.py", "docs/config.md"), ("scripts/docs/api_docs.py", "docs/python_api.md")]
    assert pages == [[], *([each] for each in made)]
    assert all((ROOT / file).exists() for found in pages for pair in found for file in pair)
    assert all(hook["language"] == "system" and re.compile(hook["files"]) for hook in repo["hooks"])


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["config-docs", "python-docs"])
def test_a_hook_writes_the_page_that_is_there(hook: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (entry,) = [each["entry"] for each in read(".pre-commit-config.yaml")["repos"][0]["hooks"] if each["id"] == hook]
    (page,) = re.findall(r"--write (\S+)'", entry)
    command = shlex.split(entry.replace(page, str(tmp_path / "page.md")))
    # The Python of an environment that is active and has everything.
    forks.as_python(tmp_path / "mine/bin/python")
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "mine"))
    monkeypatch.setenv("PATH", str(tmp_path / "mine/bin"), prepend=os.pathsep)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "page.md").read_bytes() == (ROOT / page).read_bytes()


def test_a_bug_is_reported_with_its_command_configuration_plan_and_environment() -> None:
    fields = {field["id"]: field for field in read(".github/ISSUE_TEMPLATE/bug.yml")["body"]}
    assert list(fields) == ["what", "command", "config", "plan", "environment"]
    asked = fields["environment"]["attributes"]["description"]
    (program,) = re.findall(r'python -c "(.*)"', asked)
    compile(program, "bug.yml", "exec")
    for template in ("bug", "question"):
        form = read(f".github/ISSUE_TEMPLATE/{template}.yml")
        assert {"name", "description", "body"} <= form.keys()
        assert all(field["type"] == "textarea" and field["attributes"]["label"] for field in form["body"])


def test_files_that_the_template_of_a_pull_request_names_exist() -> None:
    text = (ROOT / ".github/pull_request_template.md").read_text(encoding="utf-8")
    files = re.findall(r"`(?:bash )?([\w./]+(?:\.\w+|/))`", text)
    assert len(files) == 4 and all((ROOT / file).exists() for file in files)
