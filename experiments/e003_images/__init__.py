"""003: CIFAR-10 images, a union beside dense and MoE at equal FLOPs."""
