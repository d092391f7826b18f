"""How the test runs these scripts."""

import argparse
import warnings

warnings.filterwarnings("ignore")  # of the projects' own imports

parser = argparse.ArgumentParser()
parser.add_argument("--strategy", choices=["stock", "gpuorch"])
parser.add_argument("--workers", type=int, default=0)
parser.add_argument("--result")
options = parser.parse_args()
