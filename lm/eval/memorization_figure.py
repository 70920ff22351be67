"""The picture of a memorization test: how much of each text came back, and what telling members from controls costs."""

import io
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.eval.membership import auc, roc

MEMBER, CONTROL = "#d1495b", "#30638e"
ATTACKS = {"loss": ("loss", "#d1495b"), "zlib": ("loss / zlib", "#2e8b57"), "min_k": ("Min-K%", "#edae49"),
           "reference": ("loss / reference", "#6a4c93")}


def draw(texts: Sequence[Mapping[str, Any]], title: str) -> bytes:
    """PNG bytes from the texts of a `lm.eval.memorization.Report`: a histogram of ROUGE-L and the ROC curves."""
    # Without pyplot, so that no window system is asked for.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    of = lambda kind, name: [text[name] for text in texts if text["kind"] == kind]
    made = Figure(figsize=(10, 4), dpi=110, layout="constrained")
    left, right = made.subplots(1, 2)
    for kind, color in (("member", MEMBER), ("control", CONTROL)):
        scores = of(kind, "rouge_l")
        left.hist(scores, bins=np.linspace(0, 1, 21), weights=np.full(len(scores), 1 / len(scores)), color=color,
                  alpha=0.65, label=f"{len(scores)} {kind}s")
    left.set(xlabel="ROUGE-L of the greedy continuation", ylabel="share of texts", xlim=(0, 1))
    for name, (label, color) in ATTACKS.items():
        if name in texts[0]:
            members, controls = of("member", name), of("control", name)
            false, true = roc(members, controls)
            right.step(false, true, where="post", color=color, label=f"{label}, AUC {auc(members, controls):.3f}")
    right.plot([0, 1], [0, 1], color="#555555", linestyle=":", linewidth=1, label="chance")
    right.set(xlabel="controls taken for members", ylabel="members found", xlim=(0, 1), ylim=(0, 1.02))
    for axes in (left, right):
        axes.grid(True, color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    made.suptitle(title, fontsize=10)
    out = io.BytesIO()
    made.savefig(out, format="png", metadata={"Software": None})
    return out.getvalue()
