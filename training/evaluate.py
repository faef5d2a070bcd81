"""`accelerate launch training/evaluate.py` in a checkout is `accelerate launch -m ctrl_csc_hf.training.evaluate`."""

if __name__ == "__main__":
    import startup  # noqa: F401

    from ctrl_csc_hf.training.evaluate import launch

    launch()
