"""Prefix-tuning: one party with all the text and the frozen model tunes keys and values in front of
it.

X. L. Li, P. Liang. *Prefix-Tuning: Optimizing Continuous Prompts for Generation*. ACL 2021.
https://arxiv.org/abs/2101.00190. The text is gathered where the model is, so nothing is sent and
there is no data privacy.
"""

from __future__ import annotations

from fedsp.federation.methods.registry import MethodEntry, register_method

register_method(
    MethodEntry(
        name="prefix_tuning",
        title="prefix-tuning",
        paper="Li and Liang, ACL 2021",
        clients_hold="nothing",
        federated=False,
    )
)
