"""What clients hold and what is tuned, by method. Importing this registers all of them."""

# ruff: noqa: F401, I001 (the order is that of lists and reports)
from fedsp.federation.methods import fedsp, zero_shot, finetune, prefix_tuning
from fedsp.federation.methods import fedprompt, fedprompt_single, lora, offsite_tuning
