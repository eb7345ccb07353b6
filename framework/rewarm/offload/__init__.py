"""Where the fp32 optimizer state lives, who updates it, and when it moves."""
