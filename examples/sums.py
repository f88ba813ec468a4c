"""Write data for dpo.yaml, kto.yaml and grpo.yaml, and rate answers. python examples/sums.py"""

import json
import random


def in_figures(completions, **_):
    """Return the share of digits in every completion."""
    texts = [completion[0]["content"] for completion in completions]
    return [sum(map(str.isdigit, text)) / max(len(text), 1) for text in texts]


def main():
    """Write pairs, rated answers and prompts; the last rows are held out."""
    sums = [(i, j) for i in range(2, 12) for j in range(2, 12)]
    random.seed(0)
    random.shuffle(sums)
    pairs, rated, prompts = [], [], []
    for i, j in sums:
        prompt = {"prompt": f"What is {i} plus {j}?"}
        good, bad = f"{i} plus {j} is {i + j}.", f"{i} + {j} = {i + j}"
        pairs.append({**prompt, "chosen": good, "rejected": bad})
        rated.append({**prompt, "completion": good, "label": True})
        rated.append({**prompt, "completion": bad, "label": False})
        prompts.append(prompt)
    for name, rows, held_out in (("pairs", pairs, 4), ("rated", rated, 8), ("prompts", prompts, 4)):
        for path, part in ((name, rows[:-held_out]), (f"{name}-test", rows[-held_out:])):
            with open(f"{path}.jsonl", "w") as file:
                file.writelines(json.dumps(row) + "\n" for row in part)


if __name__ == "__main__":
    main()
