"""Several ranks: process group, collectives, environment variables, start-up of a pod."""
