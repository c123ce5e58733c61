# examples/client.
FROM scratch
COPY client /client
USER 65532:65532
ENTRYPOINT ["/client"]
