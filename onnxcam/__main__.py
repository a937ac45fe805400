"""`python -m onnxcam` is the command line."""

import sys

from onnxcam.cli import main

sys.exit(main())
