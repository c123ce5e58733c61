// Command yourproto is a model server with an API of its own: nothing in it
// knows of Sluice, apart from the role options in its .proto.
package main

import (
	"context"
	"flag"
	"log"
	"net"
	"strings"

	"google.golang.org/grpc"

	llmv1 "github.com/sluicegate/sluice/examples/yourproto/gen/acme/llm/v1"
)

func main() {
	listen := flag.String("listen", "127.0.0.1:9001", "host:port")
	flag.Parse()
	l, err := net.Listen("tcp", *listen)
	if err != nil {
		log.Fatal(err)
	}
	log.Printf("serving on %s", l.Addr())
	log.Fatal(newServer().Serve(l))
}

func newServer() *grpc.Server {
	server := grpc.NewServer()
	llmv1.RegisterAssistantServiceServer(server, assistant{})
	return server
}

// assistant answers a question with the question.
type assistant struct {
	llmv1.UnimplementedAssistantServiceServer
}

func (assistant) Ask(_ context.Context, r *llmv1.AskRequest) (*llmv1.AskResponse, error) {
	words := answer(r)
	return &llmv1.AskResponse{
		Answer:       strings.Join(words, " "),
		PromptTokens: int32(len(strings.Fields(r.GetQuestion()))),
		AnswerTokens: int32(len(words)),
	}, nil
}

func (assistant) AskStream(r *llmv1.AskStreamRequest, s grpc.ServerStreamingServer[llmv1.AskStreamResponse]) error {
	for _, word := range answer(r.GetAsk()) {
		if err := s.Send(&llmv1.AskStreamResponse{Piece: word + " "}); err != nil {
			return err
		}
	}
	return nil
}

func answer(r *llmv1.AskRequest) []string {
	words := strings.Fields("You ask: " + r.GetQuestion())
	if n := int(r.GetMaxTokens()); n > 0 && n < len(words) {
		words = words[:n]
	}
	return words
}
