"""Share of correct answers on the embedded held-out prompts:

python benchmarks/planted_answers.py fastpref/assets/tiny output/<run>/LATEST
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref.data.sources.planted import check_answer, generate_rows


def share_right(model_dir: str, *, do_sample: bool) -> float:
    """Share of the 256 test prompts answered correctly, greedily or at temperature 1, seed 0."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    prompts = [row["prompt"] for row in generate_rows("test")]
    batch = tokenizer(prompts, add_special_tokens=False, padding=True, return_tensors="pt")
    torch.manual_seed(0)
    output = model.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=40,
        do_sample=do_sample,
        # transformers' default of 50 would leave out the rest of the model's distribution
        top_k=0,
        pad_token_id=tokenizer.pad_token_id,
    )
    answers = tokenizer.batch_decode(
        output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True
    )
    return sum(map(check_answer, prompts, answers)) / len(prompts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+", help="folders of models")
    for model_dir in parser.parse_args().models:
        sampled, greedy = (share_right(model_dir, do_sample=flag) for flag in (True, False))
        print(f"{model_dir}: sampled {sampled:.3f}, greedy {greedy:.3f}")
