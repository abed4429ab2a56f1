"""The report for readers: Markdown and a page of HTML, which lose nothing."""

from __future__ import annotations

import re

import pytest
from audit_samples import outline, page_text, sample_report, timed_run

from triton_only_backend.audit import AuditReport, Provider, page


@pytest.fixture
def report() -> AuditReport:
    return sample_report()


def test_markdown_shows_findings_and_folds_the_rest(report: AuditReport) -> None:
    text = report.to_markdown()
    shown, *folded = text.split("<details>")
    assert shown.startswith("**1 operation would run outside Triton; 1 kernel did (1 graph)**")
    assert "`aten.sort.default`" in shown
    assert "aten.convolution.default" not in shown
    assert len(folded) == text.count("</details>") == 9
    table = [line for line in text.splitlines() if line.startswith("| ")]
    cells = [len(re.split(r"(?<!\\)\|", line)) - 2 for line in table]
    assert set(cells) == {7, 5, 4}
    assert r"self.conv(x) \| 1" in text


def test_the_page_needs_no_network_and_is_well_formed(report: AuditReport) -> None:
    for html in (report.to_html(), timed_run().to_html(), AuditReport().to_html()):
        parsed = outline(html)
        assert parsed.addresses == []
        assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|https?://", html)
        assert html.startswith("<!doctype html>")


def test_the_page_shows_it_all(report: AuditReport) -> None:
    html = report.to_html()
    text = page_text(html)
    for part in (
        "aten.sort.default",
        "aten.convolution.default",
        "net.py:14 in forward: torch.sort(x)",
        "vision.0",
        "Hint: <do> not",
        "nvjet <&> x",
        "vision.*::aten.conv*",
        "H200",
        "70.0%",
    ):
        assert part in text
    assert "<do>" not in html
    parsed = outline(html)
    assert sum(tag == "rect" for tag, _ in parsed.tags) == 4
    boxes = [values["class"] for tag, values in parsed.tags if tag == "i" and "title" in values]
    assert boxes == ["p-cudnn", "p-cub", "p-triton-inductor", "p-none"]
    assert html.index("nvjet &lt;&amp;&gt; x</code>") < html.index("triton_poi_0</code>")


def test_the_page_can_be_used_without_a_mouse(report: AuditReport) -> None:
    parsed = outline(report.to_html())
    for tag, values in parsed.tags:
        if values.get("role") in ("img", "region"):
            assert values.get("aria-label"), (tag, values)
        if "scroll" in (values.get("class") or "").split() or values.get("id") == "timeline":
            assert values.get("tabindex") == "0"
    assert all(values.get("lang") for tag, values in parsed.tags if tag == "html")


def test_every_provider_has_a_colour() -> None:
    html = AuditReport().to_html()
    for provider in Provider:
        assert re.search(rf"\.p-{page.slug(provider)}\b", html), provider
