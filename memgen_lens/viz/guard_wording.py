"""What a guard does, and what separates mode from content, in plain words that the numbers bear out.

Does not make HTML; what it returns is plain text, which the template escapes.
"""

from typing import Any

from memgen_lens.core.guard_records import GuardTable
from memgen_lens.core.mode_records import ModeContent, ModeRow
from memgen_lens.viz.wording import counted, interval, percent

BLOCKS = {0: "before the first block", 1: "after one block"}


def guard_verdict(table: GuardTable) -> str:
    """What is prevented, at which cost, beside steering everything and as many at random."""
    guard, every, random = table.policies["guard"], table.policies["unconditional"], table.shuffled
    text = (
        f"With the guard {_told(guard.prevented)} of the recalling test prompts recall no longer "
        f"({percent(every.prevented['rate'])} where all prompts are steered, {percent(random.prevented['mean'])} where "
        f"as many are, drawn at random), and {_told(guard.to_rule)} give the rule's answer. Of the rephrased prompts, "
        f"which compute, {_told(table.triggered['rephrased'])} are steered."
    )
    if guard.heldout is None or every.heldout is None or guard.lost is None or every.lost is None:
        return text
    before = table.policies["none"].heldout
    assert before is not None and guard.harmed is not None
    computing = table.triggered.get("heldout_computing")
    beside = "" if computing is None else f", {_told(computing)} of those that it answers by the rule unsteered"
    return (
        f"{text} Of the held-out prompts {_told(table.triggered['heldout'])} are{beside}. Held-out accuracy is "
        f"{percent(before['rate'])} unsteered, {percent(guard.heldout['rate'])} guarded and "
        f"{percent(every.heldout['rate'])} where all are steered; {_told(guard.harmed)} of the held-out prompts "
        "lose the rule's answer by the guard."
    )


def mode_findings(result: ModeContent) -> list[str]:
    """A sentence each on what carries the form and what carries the content."""
    if result.one_form:
        first = (
            "Both answers have one form here, so that mode cannot be told from content by the form: what counts is "
            "exact recall, and how often the rule's answer is left."
        )
    else:
        first = ""
    whole = result.patched("own", "all")
    answer, answer_other = result.patched("own", "answer"), result.patched("other", "answer")
    best = max(answer, key=lambda row: (row.form["rate"], row.recall["rate"]))
    twin = answer_other[answer.index(best)]
    said = [
        first,
        f"At all positions {_depth(whole[0])} a prompt is its recalling partner, and {_told(whole[0].recall)} recall "
        "exactly: the most that can be reached."
        + "".join(f" {_depth(row).capitalize()} it is {_told(row.recall)}." for row in whole[1:]),
    ]
    form, other_form = ("", "") if result.one_form else (_forms(best), _forms(twin))
    last = " (what the first token of the answer is read from)" if best.depth == result.n_depths - 1 else ""
    said.append(
        f"At the answer position alone, {_depth(best)}{last}, {form}{_told(best.recall)} give the item's own memory; "
        f"patched from another item there, {other_form}{_told(twin.recall)} give their own memory and "
        f"{_told(twin.of_source)} that of the other item."
    )
    without = best.form["ci95"][0] > best.recall["ci95"][1]
    if without and twin.form["ci95"][1] >= best.form["ci95"][0]:
        said.append("So the answer position carries the mode, from whichever item, and not the content.")
    elif best.recall["ci95"][0] > twin.recall["ci95"][1]:
        said.append("So the answer position carries content: the item's own memory comes from its own prompt alone.")
    steered = [
        row for row in result.rows if row.source is None and row.prompts == "computing" and row.name != "nothing"
    ]
    if steered:
        most = max(steered, key=lambda row: (row.recall["rate"], row.form["rate"]))
        formed = max(steered, key=lambda row: row.form["rate"])
        mode = "" if result.one_form else f"“{formed.name}” reaches the form most often ({_told(formed.form)}), and "
        said.append(f"Of the steerings, {mode}“{most.name}” reaches exact recall most often ({_told(most.recall)}).")
    return [sentence for sentence in said if sentence]


def mode_rows(result: ModeContent) -> list[dict[str, Any]]:
    """The lines of the table: everything but single positions."""
    places = {"answer": "answer position", "before": "all before it", "all": "all positions"}
    return [
        {
            "row": row,
            "where": "" if row.positions is None else places[str(row.positions)],
            "depth": "" if row.depth is None else _depth(row),
        }
        for row in result.rows
        if not isinstance(row.positions, int)
    ]


def over(result: ModeContent) -> str:
    """How many prompts the figures are of."""
    return counted(result.n, result.n_items, " prompts")


def _forms(row: ModeRow) -> str:
    return f"{_told(row.form)} take the form of a memory, "


def _depth(row: ModeRow) -> str:
    depth = row.depth or 0
    return BLOCKS.get(depth, f"after {depth} blocks")


def _told(rate: dict[str, Any] | None) -> str:
    return "none" if rate is None else f"{percent(rate['rate'])} {interval(rate['ci95'])}"
