"""Hugging Face `Trainer` with an evaluation in each epoch, a metric, accumulation and warm-up."""

import numpy as np
import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, Trainer, TrainerCallback, TrainingArguments


class Counting(Dataset):
    def __init__(self, n):
        self.rows = [[(start + k * (start % 3 + 1)) % 40 for k in range(12)] for start in range(n)]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        ids = torch.tensor(self.rows[i])
        return {"input_ids": ids, "labels": ids.clone()}


class Told(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        kept = {k: v for k, v in logs.items() if not k.endswith(("runtime", "per_second"))}
        print(state.global_step, sorted(kept.items()), flush=True)


def compute_metrics(evaluated):
    predictions = np.argmax(evaluated.predictions, axis=-1)
    return {"accuracy": float((predictions[:, :-1] == evaluated.label_ids[:, 1:]).mean())}


config = GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
torch.manual_seed(7)
model = GPT2LMHeadModel(config)
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        output_dir="out",
        num_train_epochs=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        learning_rate=5e-3,
        warmup_steps=3,
        logging_steps=2,
        eval_strategy="epoch",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=11,
        use_cpu=True,
    ),
    train_dataset=Counting(64),
    eval_dataset=Counting(12),
    compute_metrics=compute_metrics,
    callbacks=[Told()],
)
trainer.remove_callback(PrinterCallback)
trainer.train()
print("end", trainer.state.global_step, trainer.state.log_history[-1]["train_loss"])
save_file({k: v.contiguous().clone() for k, v in model.state_dict().items()}, "model.safetensors")
