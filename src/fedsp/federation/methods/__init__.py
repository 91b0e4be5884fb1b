"""What clients hold and what is tuned, by method. Importing this registers FedSP and the baselines."""

from fedsp.federation.methods import fedsp, zero_shot, finetune, prefix_tuning, fedprompt, fedprompt_single, lora, offsite_tuning  # noqa: F401, I001 (the order of lists)
