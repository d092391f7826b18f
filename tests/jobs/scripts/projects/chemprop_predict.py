"""chemprop's quickstart: a message passing network predicts molecules, stock on one device or on two."""

import lightning.pytorch as pl
import torch
from arguments import options
from chemprop import data, featurizers, models, nn

import lightning_gpuorch  # noqa: F401 - registers strategy="gpuorch"

pl.seed_everything(1)
molecules = ["C" * left + "O" + "C" * right for left in range(1, 8) for right in range(1, 7)]
dataset = data.MoleculeDataset(
    [data.MoleculeDatapoint.from_smi(molecule) for molecule in molecules],
    featurizers.SimpleMoleculeMolGraphFeaturizer(),
)
loader = data.build_dataloader(dataset, batch_size=5, shuffle=False, num_workers=options.workers)
model = models.MPNN(
    nn.BondMessagePassing(d_h=16), nn.MeanAggregation(), nn.RegressionFFN(input_dim=16, hidden_dim=8), True
)
where = {"devices": 1} if options.strategy == "stock" else {"devices": 2, "strategy": "gpuorch"}
trainer = pl.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, **where)
with torch.inference_mode():
    predictions = trainer.predict(model, loader)
if trainer.is_global_zero:
    torch.save({"predictions": list(predictions), "all": torch.cat(list(predictions))}, options.result)
