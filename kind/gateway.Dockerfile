# The gateway, and the model server of the demo: one static binary, nothing else.
FROM scratch
COPY sluice /sluice
USER 65532:65532
ENTRYPOINT ["/sluice"]
