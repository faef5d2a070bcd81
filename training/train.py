"""`accelerate launch training/train.py` in a checkout is `accelerate launch -m ctrl_csc_hf.training.train`."""

if __name__ == "__main__":
    import startup  # noqa: F401

    from ctrl_csc_hf.training.train import launch

    launch()
