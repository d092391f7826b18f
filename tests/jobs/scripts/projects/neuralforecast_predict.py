"""neuralforecast's quickstart, on the package ``pytorch_lightning``: fit on one device, predict stock or on two."""

import os

import numpy as np
import pandas as pd
import torch
from arguments import options
from neuralforecast import NeuralForecast
from neuralforecast.models import MLP

import lightning_gpuorch.pytorch_lightning  # noqa: F401 - registers strategy="gpuorch"

frame = pd.DataFrame(
    {
        "unique_id": np.repeat([str(number) for number in range(41)], 40),
        "ds": np.tile(np.arange(40), 41),
        "y": np.random.default_rng(1).normal(size=1640).cumsum(),
    }
)
model = MLP(
    h=4, input_size=8, hidden_size=8, max_steps=3, batch_size=4, random_seed=1,
    dataloader_kwargs={"num_workers": options.workers},
    accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
)  # fmt: skip
forecast = NeuralForecast(models=[model], freq=1)
forecast.fit(df=frame)
if options.strategy == "gpuorch":
    forecast.models[0].trainer_kwargs.update(strategy="gpuorch", devices=2)
found = forecast.predict()
if os.environ.get("RANK", "0") == "0":
    columns = {name: found[name].tolist() for name in found.columns}
    torch.save({"type": type(found).__name__, "types": list(map(str, found.dtypes)), **columns}, options.result)
