"""RobustDEQ: a benchmark of adversarial robustness for models that iterate to an answer."""
__version__="0"
