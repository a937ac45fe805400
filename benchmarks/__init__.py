"""Speed, memory and start-up of onnxcam beside plain inference and its peers; never part of a timed test.

python -m benchmarks.speed -o docs/speed.md     everything, as one table with ratios
python -m benchmarks.profile MODEL --layer L    where the time of one compiled explanation goes, node by node
"""
