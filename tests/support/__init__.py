"""What tests share: the real command, real servers and proxies that make them fail, images."""
