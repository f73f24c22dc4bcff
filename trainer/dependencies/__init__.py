"""Access to other packages beyond their public interface. DeepSpeed's is in `trainer/engine`."""
