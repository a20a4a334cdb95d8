"""The server many times over, on engines that spread processes over machines: Ray Serve and Dynamo. See docs/replicas.md."""
