"""A transformers model inside a LightningModule, on meta, sharded: generation, bfloat16, torch.compile."""

import os
from pathlib import Path

import lightning.pytorch as pl
import torch
import transformers
from common import parser, quiet_trainer, write_result
from torch.utils.data import DataLoader

from lightning_gpuorch.parallel.tensor_parallel import applied_plan, empty_parameters
from lightning_gpuorch.pytorch import GPUOrchStrategy

CONFIG = transformers.GPT2Config(
    vocab_size=512, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2, pad_token_id=0
)
OPTIONS = {"max_new_tokens": 6, "min_new_tokens": 4}


class Generator(pl.LightningModule):
    """Generates; the weights come with ``ckpt_path``."""

    def __init__(self, **options):
        super().__init__()
        self.options = {**OPTIONS, **options}
        self.model = None
        self.seen = []

    def configure_model(self):
        if self.model is None:
            with empty_parameters():
                self.model = transformers.GPT2LMHeadModel(CONFIG)

    def predict_step(self, batch, batch_idx):
        tokens = self.model.generate(input_ids=batch, **self.options)
        self.seen.append(tokens.tolist())
        return tokens


class Scorer(pl.LightningModule):
    """One forward per batch."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch):
        return self.model(input_ids=batch).logits

    def predict_step(self, batch, batch_idx):
        return self(batch)


def main():
    options = parser().parse_args()
    rank = int(os.environ.get("RANK", 0))
    ids = torch.randint(5, 500, (8, 10), generator=torch.Generator().manual_seed(1))
    loader = DataLoader(ids, batch_size=4)
    torch.manual_seed(0)
    whole = transformers.GPT2LMHeadModel(CONFIG).eval()
    folder = Path(os.environ["CHECKPOINTS"])
    with torch.no_grad():
        expected = [whole.generate(input_ids=batch, do_sample=False, **OPTIONS).tolist() for batch in loader]
        logits = torch.cat([whole(input_ids=batch).logits for batch in loader])
    result = {}

    def predict(model, **settings):
        precision = settings.pop("precision", "32-true")
        strategy = GPUOrchStrategy(tensor_parallel_size=options.tp, plan_cache="off")
        trainer = quiet_trainer(strategy, options.devices, precision=precision)
        torch.manual_seed(100 + rank)  # ranks must agree all the same
        outputs = list(trainer.predict(model, loader, **settings))
        return outputs, strategy.runtime.world

    if "RANK" not in os.environ:  # the launching process, before it starts the ranks
        whole.save_pretrained(folder / "gpt2")
    checkpoint = str(folder / "gpt2")
    outputs, world = predict(Generator(do_sample=False), ckpt_path=checkpoint)
    result["greedy"] = [tokens.tolist() for tokens in outputs] == expected
    for name, how in {
        "sampling": {"do_sample": True, "top_k": 50, "temperature": 1.5},
        "beam": {"num_beams": 3, "do_sample": False},
    }.items():
        model = Generator(**how)
        outputs, world = predict(model, ckpt_path=checkpoint)
        seen = world.collectives.all_gather_object(model.seen)
        result[name] = [tokens.tolist() for tokens in outputs] == seen[0] and seen.count(seen[0]) == len(seen)

    model = Scorer(transformers.GPT2LMHeadModel.from_pretrained(checkpoint))
    outputs, _ = predict(model, precision="bf16-true")
    error = (torch.cat([value.float() for value in outputs]) - logits).abs().max() / logits.abs().max()
    result["bfloat16"] = [str(outputs[0].dtype), float(error)]

    compiled = torch.compile(
        Scorer(transformers.GPT2LMHeadModel.from_pretrained(checkpoint)), backend=os.environ["BACKEND"]
    )
    outputs, _ = predict(compiled)
    result["compiled"] = float((torch.cat(outputs) - logits).abs().max() / logits.abs().max())
    result["sharded"] = applied_plan(compiled._orig_mod) is not None
    result["graphs"] = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    if rank == 0:
        write_result(options, result)


if __name__ == "__main__":
    main()
