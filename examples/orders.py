"""Write orders and what is to be read from them, as JSON. python examples/orders.py"""

import json
import random

NAMES = ["Ana", "Ben", "Chloe", "Dan", "Ella", "Finn", "Grace", "Hugo"]
THINGS = ["pens", "books", "apples", "cups", "candles", "tickets", "balls", "plants"]

rows = [
    {
        "prompt": f"{name} would like {count} {thing}, please.",
        "completion": json.dumps({"item": thing, "count": count, "for": name}),
    }
    for name in NAMES
    for thing in THINGS
    for count in range(2, 10)
]
random.seed(0)
random.shuffle(rows)  # else the file's end, which is held out, would be unlike its beginning
for path, part in ("train.jsonl", rows[:-8]), ("test.jsonl", rows[-8:]):
    with open(path, "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in part)
