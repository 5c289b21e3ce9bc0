"""The model card: what really happened, for whoever finds the checkpoint later.

In: the report of a run. Out: Markdown. States figures and leaves praise out; what the
report does not hold, the card does not say.
"""

from __future__ import annotations

from typing import Any

from int8qa.build.stored_ranges import RANGES_FILENAME


def write_card(report: dict[str, Any]) -> str:
    """The card of a finished run; see run.py for the report's members."""
    options = report["options"]
    start = report["start"]
    parts = [
        f"# {report['name']}: extractive question answering",
        (
            f"`{report['architecture']}`, {report['parameters'] / 1e6:.1f} million "
            f"parameters, stored as {report['dtype']} safetensors. Trained by int8qa "
            f"{report['versions']['int8qa']}, finished {report['finished_at']}."
        ),
        "## Start",
        f"- Checkpoint: {start['name']}, SHA-256 `{start['sha256']}`"
        + ("; its question answering head is new" if start["fresh_head"] else ""),
    ]
    if report["teacher"] is not None:
        how = options["distillation"]
        parts.append(
            f"- Teacher: {report['teacher']['name']}, SHA-256 "
            f"`{report['teacher']['sha256']}`; temperature {how['temperature']:g}, "
            f"{100 * how['weight']:g} % of the loss"
        )
    if options["quantization"] is not None:
        how = options["quantization"]
        smoothed = "with" if how["smooth"] else "without"
        parts.append(
            f"- Trained with INT8's rounding in the graph: recipe "
            f"{how['recipe']['name']} for {how['target']}, calibrator "
            f"{how['calibrator']}, {smoothed} SmoothQuant, "
            f"{report['quantized_tensors']} tensors. Its ranges are in "
            f"`{RANGES_FILENAME}`, and `int8qa build` keeps them"
        )
    parts += [
        "## Data",
        _table(
            "file|with answer|without|negatives made|windows|left out|SHA-256",
            [
                [
                    data["name"],
                    data["questions"],
                    data["unanswerable"],
                    data["negatives"],
                    data["windows"],
                    data["skipped"],
                    f"`{data['sha256']}`",
                ]
                for data in report["data"]
            ],
        ),
        (
            "Licences and origin of these files are not known to the tool; add them "
            "before you pass the checkpoint on."
        ),
        "## Recipe",
        _describe_recipe(report),
        f"```\n{report['command']}\n```",
        "## Measured",
        _describe_scores(report),
    ]
    versions = ", ".join(
        f"{name} {value}" for name, value in report["versions"].items()
    )
    parts += ["## Versions", versions, ""]
    return _join(parts)


def _join(parts: list[str]) -> str:
    """Paragraphs, with the items of a list kept together."""
    text = ""
    previous = ""
    for part in parts:
        listed = part.startswith("- ") and previous.startswith("- ")
        text += ("" if not text else "\n" if listed else "\n\n") + part
        previous = part
    return text.rstrip("\n") + "\n"


def _describe_recipe(report: dict[str, Any]) -> str:
    options = report["options"]
    order = "file after file" if options["keep_order"] else "files mixed"
    dropout = options["dropout"]
    losses = report["losses"]
    fell = (
        f" The loss was {losses[0][1]:.3f} at step {losses[0][0]} and "
        f"{losses[-1][1]:.3f} at step {losses[-1][0]}."
        if losses
        else ""
    )
    resumed = report["resumed"]
    return (
        f"{options['epochs']:g} epochs, {report['steps']} steps of up to "
        f"{options['batch']} windows of up to {report['max_window_tokens']} tokens "
        f"(overlap {report['doc_stride']}), {order}, batches of like length. AdamW, "
        f"learning rate {options['learning_rate']:g} falling linearly after "
        f"{100 * options['warmup']:g} % warm-up, {options['layer_decay']:g} of it per "
        f"layer below the head, weight decay {options['weight_decay']:g}, dropout "
        f"{'as the checkpoint says' if dropout is None else f'{dropout:g}'}, seed "
        f"{options['seed']}, {report['precision']} on {report['device']}. "
        f"{report['train_seconds'] / 60:.1f} minutes of training"
        + (f", resumed {resumed} times." if resumed else ".")
        + fell
    )


def _describe_scores(report: dict[str, Any]) -> str:
    if not report["scores"]:
        return "Nothing: no evaluation data was given."
    rows = []
    for scores in report["scores"]:
        row = [scores["file"], scores["precision"], scores["total"]]
        for key in ("exact", "f1", "has_ans_exact", "has_ans_f1", "no_ans_exact"):
            value = scores[key]
            row.append("" if value is None else f"{value:.2f}")
        rows.append(row)
    note = (
        "int8 is ModelOpt's fake quantization. Where a file has questions without an "
        "answer, the null answer was allowed. For such questions EM and F1 are one."
    )
    heads = "file|precision|questions|EM|F1|HasAns EM|HasAns F1|NoAns EM"
    return f"{_table(heads, rows)}\n\n{note}"


def _table(heads: str, rows: list[list[Any]]) -> str:
    names = heads.split("|")
    lines = [
        "| " + " | ".join(names) + " |",
        "|" + "---|" * len(names),
        *("| " + " | ".join(str(cell) for cell in row) + " |" for row in rows),
    ]
    return "\n".join(lines)
