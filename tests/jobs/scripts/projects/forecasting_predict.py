"""pytorch-forecasting's ``model.predict``, which gives back what a callback of its own has collected."""

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from arguments import options
from pytorch_forecasting import NBeats, TimeSeriesDataSet

import lightning_gpuorch  # noqa: F401 - registers strategy="gpuorch_replay_outputs"

pl.seed_everything(1)
frame = pd.DataFrame(
    {
        "series": np.repeat([str(number) for number in range(23)], 30),
        "time": np.tile(np.arange(30), 23),
        "value": np.random.default_rng(1).normal(size=690).cumsum().astype("float32"),
    }
)
dataset = TimeSeriesDataSet(
    frame, time_idx="time", target="value", group_ids=["series"], max_encoder_length=12, max_prediction_length=4,
    time_varying_unknown_reals=["value"],
)  # fmt: skip
model = NBeats.from_dataset(dataset, widths=[8, 8])
where = {"devices": 1} if options.strategy == "stock" else {"devices": 2, "strategy": "gpuorch_replay_outputs"}
found = model.predict(
    dataset, batch_size=16, num_workers=options.workers, return_index=True, return_y=True,
    trainer_kwargs={"accelerator": "cpu", "logger": False, "enable_checkpointing": False, **where},
)  # fmt: skip
result = {
    "type": type(found).__name__,
    "output": found.output,
    "y": found.y[0],
    "index": found.index.astype(str).to_numpy().tolist(),
}
if model.trainer.is_global_zero:
    torch.save(result, options.result)
