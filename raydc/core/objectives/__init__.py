"""The clustering objectives, one file each: its equations as functions, and the module that the trainer steps."""
