"""RaSA's entry for PEFT's MetaMathQA benchmark."""
