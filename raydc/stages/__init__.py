"""The stages of a run: each joins the mathematics in core to Ray and the lake, and can be done again at any point."""
