"""Links in README and docs lead somewhere, and so do citations of the method."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
CITING = [*PAGES, *(path for folder in ("tokmat_jax", "tests", "benchmarks", "configs")
                    for path in sorted((ROOT / folder).rglob("*.py")))]


def headings(path):
    """The headings of a page, as they are written."""
    return re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_or_a_heading(path):
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        file, _, heading = target.partition("#")
        whole = path.parent / file if file else path
        assert whole.exists(), f"{path.name}: {target}"
        if heading:
            slugs = [re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in headings(whole)]
            assert heading in slugs, f"{path.name}: {target}"


def test_every_cited_section_of_the_method_has_its_heading():
    known = {found[1] for line in headings(ROOT / "docs" / "method.md") if (found := re.match(r"§(\d+) \S", line))}
    cited = {path: set(re.findall(r"METHOD §(\d+)", path.read_text(encoding="utf-8"))) for path in CITING}
    assert set.union(*cited.values()) >= {"2", "3", "4", "5"}
    for path, sections in cited.items():
        assert sections <= known, f"{path.relative_to(ROOT)} cites {sections - known}"


def test_the_readme_leads_to_every_page():
    linked = set(re.findall(r"\]\(docs/([\w-]+\.md)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= linked


def test_named_files_of_the_project_are_there():
    for path in CITING:
        for name in re.findall(r"\b(?:tests|benchmarks|tokmat_jax)/[\w/]+\.py\b", path.read_text(encoding="utf-8")):
            assert (ROOT / name).is_file(), f"{path.relative_to(ROOT)} names {name}"
