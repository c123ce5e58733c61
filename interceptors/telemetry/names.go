package telemetry

import (
	"go.opentelemetry.io/otel/attribute"
	semconv "go.opentelemetry.io/otel/semconv/v1.41.0"
	"google.golang.org/grpc/codes"
)

// Every name that this package emits is in this file. The names of gen_ai.* are
// those of the OpenTelemetry semantic conventions 1.41, the last that has them in
// one piece; those of rpc.* are the same in 1.41 and 1.44.

const scope = "github.com/sluicegate/sluice/interceptors/telemetry"

// Metrics.
const (
	serverCallDuration  = "rpc.server.call.duration"
	clientCallDuration  = "rpc.client.call.duration"
	serverDuration      = "gen_ai.server.request.duration"
	serverFirstToken    = "gen_ai.server.time_to_first_token"
	serverPerToken      = "gen_ai.server.time_per_output_token"
	clientDuration      = "gen_ai.client.operation.duration"
	clientFirstChunk    = "gen_ai.client.operation.time_to_first_chunk"
	clientTokenUsage    = "gen_ai.client.token.usage"
	activeInferences    = "sluice.inferences.active"
	denialsMetric       = "sluice.denials"
	eventsMetric        = "sluice.events"
	driftMetric         = "sluice.tokens.drift"
	unitRatio           = "1"
	poolCapacity        = "sluice.pool.permits.capacity"
	poolInUse           = "sluice.pool.permits.in_use"
	poolGateways        = "sluice.pool.gateways"
	poolQueueLength     = "sluice.pool.queue.length"
	poolQueueWait       = "sluice.pool.queue.wait"
	poolRefused         = "sluice.pool.refused"
	poolTenantInUse     = "sluice.pool.tenant.permits.in_use"
	poolTenantLength    = "sluice.pool.tenant.queue.length"
	poolTenantWait      = "sluice.pool.tenant.queue.wait"
	poolTenantServed    = "sluice.pool.tenant.served"
	serverReady         = "sluice.server.ready"
	serverEjected       = "sluice.server.ejected"
	serverInUse         = "sluice.server.permits.in_use"
	serverWaiting       = "sluice.server.reported.waiting"
	serverRunning       = "sluice.server.reported.running"
	serverUtilization   = "sluice.server.reported.utilization"
	unitOne             = "1"
	unitServer          = "{server}"
	unitPermit          = "{permit}"
	unitGateway         = "{gateway}"
	unitSeconds         = "s"
	unitTokens          = "{token}"
	unitInference       = "{inference}"
	unitDenial          = "{denial}"
	unitEvent           = "{event}"
	verdictEvent        = "sluice.verdict"
	eventPrefix         = "sluice."
	thresholdEvent      = "threshold"
	metadataPrefix      = "sluice.denial."
	otherMethod         = "_OTHER" // rpc.method of methods that no back end has
	otherModel          = "other"  // gen_ai.request.model of models that nobody configured
	otherError          = "_OTHER" // error.type without a name
	otherProvider       = "_OTHER" // gen_ai.provider.name where no back end serves the model
	operationText       = "text_completion"
	operationOther      = "inference"
	outcomeServed       = "served"
	outcomeRefused      = "refused"
	outcomeCut          = "cut"
	outcomeFailed       = "failed"
	outcomeCancelled    = "cancelled"
	tokenInput          = "input"
	tokenOutput         = "output"
	attributesPerSource = 16 // pairs taken from one denial or event
)

// Attributes of ours. The rest are in semconv.
const (
	principalKey   = attribute.Key("sluice.principal")
	tenantKey      = attribute.Key("sluice.tenant")
	backendKey     = attribute.Key("sluice.backend")
	inferenceIDKey = attribute.Key("sluice.inference.id")
	outcomeKey     = attribute.Key("sluice.outcome")
	policyKey      = attribute.Key("sluice.policy")
	reasonKey      = attribute.Key("sluice.reason")
	fieldKey       = attribute.Key("sluice.field")
	eventKey       = attribute.Key("sluice.event")
	budgetKey      = attribute.Key("sluice.budget")
	percentKey     = attribute.Key("sluice.percent")
	poolKey        = attribute.Key("sluice.pool")
	priorityKey    = attribute.Key("sluice.priority")
)

// The bucket boundaries, as the conventions advise them.
var (
	callBuckets       = []float64{.005, .01, .025, .05, .075, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10}
	durationBuckets   = []float64{.01, .02, .04, .08, .16, .32, .64, 1.28, 2.56, 5.12, 10.24, 20.48, 40.96, 81.92}
	firstTokenBuckets = []float64{.001, .005, .01, .02, .04, .06, .08, .1, .25, .5, .75, 1, 2.5, 5, 7.5, 10}
	perTokenBuckets   = []float64{.01, .025, .05, .075, .1, .15, .2, .3, .4, .5, .75, 1, 2.5}
	usageBuckets      = []float64{1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144, 1048576, 4194304, 16777216, 67108864}
)

// driftBuckets are closest where two tokenizers of one family are apart. Chosen.
var driftBuckets = []float64{.25, .5, .75, .9, .95, .99, 1.01, 1.05, 1.1, 1.25, 1.5, 2, 4}

// codeNames are the gRPC status codes as the conventions write them.
var codeNames = [...]string{
	codes.OK:                 "OK",
	codes.Canceled:           "CANCELLED",
	codes.Unknown:            "UNKNOWN",
	codes.InvalidArgument:    "INVALID_ARGUMENT",
	codes.DeadlineExceeded:   "DEADLINE_EXCEEDED",
	codes.NotFound:           "NOT_FOUND",
	codes.AlreadyExists:      "ALREADY_EXISTS",
	codes.PermissionDenied:   "PERMISSION_DENIED",
	codes.ResourceExhausted:  "RESOURCE_EXHAUSTED",
	codes.FailedPrecondition: "FAILED_PRECONDITION",
	codes.Aborted:            "ABORTED",
	codes.OutOfRange:         "OUT_OF_RANGE",
	codes.Unimplemented:      "UNIMPLEMENTED",
	codes.Internal:           "INTERNAL",
	codes.Unavailable:        "UNAVAILABLE",
	codes.DataLoss:           "DATA_LOSS",
	codes.Unauthenticated:    "UNAUTHENTICATED",
}

// codeName names a code that codeOf returned.
func codeName(c codes.Code) string { return codeNames[c] }

// isError reports whether a code makes the RPC span an error: on the client
// side all but OK, on the server side only what is the server's fault. So a
// refusal is no error of the gateway.
func isError(c codes.Code, client bool) bool {
	if client {
		return c != codes.OK
	}
	switch c {
	case codes.Unknown, codes.DeadlineExceeded, codes.Unimplemented, codes.Internal, codes.Unavailable, codes.DataLoss:
		return true
	}
	return false
}

var rpcSystem = semconv.RPCSystemNameGRPC
