"""Fine-tune a Transformers classifier with FreezeOut: python examples/transformers_finetune.py

Runs as it is on a tiny randomly initialised BERT and a toy task (does a row hold more high than low tokens?), offline.
With --model it fine-tunes that checkpoint in its place.
"""

import argparse
import tempfile

import torch
from transformers import AutoModelForSequenceClassification, BertConfig, Trainer, TrainingArguments

from freezeout_ext.integrations.transformers import add_freezeout


def rows(count: int, seed: int) -> list[dict]:
    tokens = torch.randint(5, 105, (count, 16), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": int((row >= 55).sum() > 8)} for row in tokens]


def accuracy(prediction) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def main() -> float:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="name or path of a checkpoint")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--t_0", type=float, default=0.6)
    args = parser.parse_args()

    torch.manual_seed(0)
    if args.model:
        model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=2)
    else:
        config = BertConfig(
            vocab_size=105,
            hidden_size=32,
            num_hidden_layers=4,
            num_attention_heads=2,
            intermediate_size=64,
            num_labels=2,
        )
        model = AutoModelForSequenceClassification.from_config(config)

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=args.epochs,
                per_device_train_batch_size=16,
                learning_rate=5e-5 if args.model else 2e-3,
                warmup_steps=5,
                logging_steps=20,
                save_strategy="no",
                report_to=[],
            ),
            train_dataset=rows(800, seed=0),
            eval_dataset=rows(200, seed=1),
            compute_metrics=accuracy,
        )
        callback = add_freezeout(trainer, t_0=args.t_0)
        trainer.train()
        for transition in callback.freezeout.transitions:
            print(f"step {transition.step}: froze {', '.join(transition.layers)}")
        found = trainer.evaluate()["eval_accuracy"]
    print(f"{callback.freezeout}\ntest accuracy {found:.3f}")
    return found


if __name__ == "__main__":
    main()
