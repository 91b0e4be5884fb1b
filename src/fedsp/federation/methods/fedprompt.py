"""FedPrompt: every client holds the whole frozen model and tunes the prompt through it; prompts are
averaged.

H. Zhao, W. Du, F. Li, P. Li, G. Liu. *FedPrompt: Communication-Efficient and Privacy-Preserving
Prompt Tuning in Federated Learning*. ICASSP 2023. https://arxiv.org/abs/2208.12268.
As in FedSP's table, every layer has a prompt, and the server may take steps on its own examples.
No model privacy: an upper bound on the quality of a prompt that clients tune.
"""

from __future__ import annotations

from fedsp.federation.methods.registry import MethodEntry, register_method

register_method(
    MethodEntry(
        name="fedprompt",
        title="FedPrompt",
        paper="Zhao et al., ICASSP 2023",
        clients_hold="the whole model",
    )
)
