"""One neuron drawn and written up: in a notebook on its own, in the report among the others."""

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import memgen_lens as mg
from memgen_lens.core.errors import RunDirectoryError, SettingsError
from memgen_lens.core.neuron_records import DrivingPrompt, Estimate, SideChange, TokenEffect, save_neurons
from memgen_lens.one_neuron import NeuronPage
from memgen_lens.viz import report
from memgen_lens.viz.contents import read_run
from memgen_lens.viz.neuron_page import fragment
from memgen_lens.viz.wording import signed


class Parsed(HTMLParser):
    """Tags, and the text between them but for styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags, self.texts, self.hidden = [], [], False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.hidden = tag in ("style", "script")

    def handle_endtag(self, tag):
        self.hidden = False
        self.texts += [" "] if tag in ("td", "th", "p") else []

    def handle_data(self, data):
        if not self.hidden:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.texts).split())


@pytest.fixture(scope="module")
def record(samples):
    return samples.neuron_record()


@pytest.fixture(scope="module")
def page(record) -> Parsed:
    return Parsed(NeuronPage(**vars(record))._repr_html_())


def test_a_notebook_shows_what_the_record_holds(page):
    for text in (
        "Layer 1, neuron 37 of post",
        "Higher where the model recalls than where it computes: mean difference 1.100 [0.950, 1.250], AUROC 0.990",
        "(24 pairs).",
        "Set to zero, it moves the answer by 3.500 nats towards the rule's on recalling prompts, and 50 % of them",
        "Doubled, it moves the answer by 2.500 nats towards the memorized one on recalling prompts, and 100 % of them",
        "set to its mean",
        "−3.500 [−3.700, −3.300]",
        '"<mem-" +0.810',
        '" a" +0.200',
        '"7" −0.440',
        "Highest on",
        "<mem-0b1c> 640",
    ):
        assert text in page.text.replace("\xa0", " "), text


def test_a_notebook_needs_nothing_but_the_page(page, record):
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "img", "iframe"}
    assert not re.search(r"https?://|@import|url\(", fragment(record))
    assert len(fragment(record)) < 20_000
    heights = [float(attributes["height"]) for tag, attributes in page.tags if tag == "rect"]
    assert max(heights) == pytest.approx(56, abs=0.1)
    titles = re.findall(r"<title>(\d+) (recalling|computing) prompts", fragment(record))
    for side in ("recalling", "computing"):
        assert sum(int(count) for count, name in titles if name == side) == 24, "each prompt is in one bar"


def test_what_is_not_known_says_why(record):
    nothing = SideChange(None, None, None)
    changes = tuple(replace(change, memorized=nothing, generalized=nothing, examples=()) for change in record.changes)
    why = {"tokens": "weights <hidden>", "contrast": "no answers"}
    text = Parsed(fragment(replace(record, changes=changes, favoured=(), suppressed=(), why=why))).text
    assert "Tokens not known. weights <hidden>" in text and "Contrast not measured. no answers" in text
    assert "Set to zero, " not in text and "favours" not in text


def test_what_the_interval_does_not_tell_from_nothing_is_not_called_something(record):
    changes = tuple(
        replace(change, memorized=replace(change.memorized, contrast=Estimate(-0.1, (-0.4, 0.2))))
        for change in record.changes
    )
    text = Parsed(fragment(replace(record, nmd=Estimate(0.1, (-0.2, 0.3)), changes=changes))).text
    assert "Not shown to be higher or lower where the model recalls" in text
    assert "it is not shown to move the answer (−0.100) on recalling prompts" in text
    own = Parsed(fragment(replace(record, metric="<i>odds</i>"))).text
    assert "it moves <i>odds</i> by −3.500 on recalling prompts" in own and "change of <i>odds</i>" in own
    lower = Parsed(fragment(replace(record, nmd=Estimate(-1.0, (-1.2, -0.8))))).text
    assert "Lower where the model recalls than where it computes: mean difference −1.000 [−1.200, −0.800]" in lower


@settings(deadline=None, max_examples=40)
@given(text=st.text(min_size=1), token=st.text(min_size=1))
@example(text="</td></table><script>alert(1)</script>", token="</script><img src=x onerror=alert(1)>")
@example(text="{{ 7 * 7 }} &lt; \" ' <!-- ", token="\n\t\\")
def test_any_prompt_and_token_is_shown_as_it_is_and_never_as_html(record, text, token):
    plain = record
    driving = tuple(DrivingPrompt(text, "memorized", one.activation) for one in plain.highest)
    shown = {"prompt": text, "side": "memorized", "before": token, "after": text, "behavior": "other"}
    changes = tuple(replace(change, examples=(shown,) * len(change.examples)) for change in plain.changes)
    effects = (TokenEffect(token, 1, 0.5),) * len(plain.favoured)
    other = Parsed(fragment(replace(plain, highest=driving, changes=changes, favoured=effects, why={})))
    assert [tag for tag, _ in other.tags] == [tag for tag, _ in Parsed(fragment(plain)).tags]
    assert "".join(other.texts).count(text) >= 6


def test_the_figure_counts_every_prompt_once(record):
    figure = mg.figures.neuron_activations(record)
    bars = [trace for trace in figure.data if trace.type == "bar"]
    assert [sum(trace.customdata[:, 0]) for trace in bars] == [24, 24]
    assert min(bars[0].y) >= 0 >= max(bars[1].y), "recalling upwards, computing downwards"
    means = [trace.x[0] for trace in figure.data if trace.type == "scatter"]
    assert means == pytest.approx([record.memorized.mean(), record.generalized.mean()])
    assert "layer 1, neuron 37 (24 pairs)" in figure.layout.title.text


def test_a_neuron_that_never_changes_is_drawn_in_one_bar(record):
    zero = replace(record, memorized=np.zeros(24, np.float32), generalized=np.zeros(24, np.float32))
    bars = [trace for trace in mg.figures.neuron_activations(zero).data if trace.type == "bar"]
    assert [len(trace.x) for trace in bars] == [1, 1]
    assert "the highest bar is 24 prompts" in Parsed(fragment(zero)).text


def test_a_figure_of_something_else_is_refused():
    with pytest.raises(SettingsError, match=r"neuron_activations\(neuron=\.\.\.\): expected NeuronRecord as mg.neuron"):
        mg.figures.neuron_activations("post")  # pyright: ignore[reportArgumentType]


def test_the_report_shows_the_neurons_that_a_run_has_looked_at(samples, record, tmp_path):
    directory = samples.write_run(tmp_path / "run")
    with mock.patch.object(report, "get_plotlyjs", return_value=""):
        assert read_run(directory).neurons == ()
        without = report.render(read_run(directory))
        save_neurons([record, replace(record, layer=0, neuron=5)], directory)
        run = read_run(directory)
        html = report.render(run)
    assert [(neuron.layer, neuron.neuron) for neuron in run.neurons] == [(1, 37), (0, 5)]
    assert "What single neurons do" in html and "What single neurons do" not in without
    parsed = Parsed(html)
    by = "correlates most with the behaviour on select (Pearson’s rho, by size, whatever ranks the neurons that are"
    for text in ("Layer 1, neuron 37 of post", "Layer 0, neuron 5 of post", "Tokens it favours", by):
        assert text in parsed.text
    plots = {attributes.get("id") for _, attributes in parsed.tags}
    assert {"plot-neuron-0", "plot-neuron-1"} <= plots
    assert parsed.text.index("Which neurons differ") < parsed.text.index("Layer 1, neuron 37")
    assert ("a", {"href": "#single"}) in parsed.tags and ("a", {"href": "#single"}) not in Parsed(without).tags


@pytest.mark.parametrize("damage", ["cut", "another"])
def test_a_damaged_file_of_neurons_is_named(samples, record, tmp_path, damage):
    directory = samples.write_run(tmp_path / "run")
    path = save_neurons([record], directory)
    path.write_text(path.read_text()[:-20] if damage == "cut" else '{"neurons": [{"site": "post"}]}')
    with pytest.raises(RunDirectoryError, match=r"neurons\.json.*damaged"):
        read_run(directory)
    shutil.rmtree(directory)


@pytest.mark.parametrize(
    ("value", "text"), [(1.5, "+1.500"), (-0.25, "−0.250"), (0.0001, "0.000"), (-0.0001, "0.000"), (None, "–")]
)
def test_signs_are_written(value, text):
    assert signed(value) == text
