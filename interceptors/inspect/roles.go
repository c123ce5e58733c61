package inspect

import (
	"bytes"
	"slices"
)

// speaker is whose words a part of a text are, where the text says so itself: the messages
// of a chat in JSON, or in the marks of a chat template.
type speaker uint8

// What a text says is who speaks as the caller would have it: of a tool's words less is
// enough to be an attack, a system prompt may have more of one about it.
const (
	anybody speaker = iota // the whole text
	user                   // what nobody else says
	system
	tool
	speakers
)

// speakerNames are what rules call them.
var speakerNames = [speakers]string{"", "user:", "system:", "tool:"}

// scoreOf are the detectors of the score of one speaker's words.
func scoreOf(found uint64, by speaker) uint64 { return found << (int(by) * len(scoreRates)) }

const allScores = firstScore<<len(scoreRates) - firstScore

// roleMask are the detectors of the score that need to know who speaks.
const roleMask = scoreMask &^ allScores

// speakerOf knows the roles of chats by their names.
func speakerOf(role []byte) speaker {
	switch string(bytes.ToLower(role)) {
	case "system", "developer":
		return system
	case "tool", "tool_result", "tool_response", "function", "ipython", "observation", "environment", "document", "documents", "context":
		return tool
	}
	return user
}

// utterance is a part of a text.
type utterance struct {
	start, end int
	by         speaker
}

// speech is what the roles in a text say of its parts: those of tools and of the system, and the
// marks, which nobody says; ok if it has any roles.
func speech(text []byte) (parts []utterance, ok bool) {
	if head := bytes.TrimLeft(text, " \t\r\n"); len(head) > 0 && (head[0] == '{' || head[0] == '[') && bytes.Contains(head, []byte(`"role"`)) {
		return chat(text)
	}
	if bytes.Contains(text, []byte("<|im_start|>")) || bytes.Contains(text, []byte("<|start_header_id|>")) {
		return marked(text), true
	}
	return nil, false
}

// deepest is how deep JSON may be nested: deeper than people write it.
const deepest = 64

// chat reads the objects of JSON that have a role: all strings in one are said in it. It is
// no judge of JSON: what it does not understand ends it, and is the user's.
func chat(text []byte) (parts []utterance, ok bool) {
	type object struct {
		role speaker // 0: none so far
		from int     // of the strings in it
	}
	var (
		open    []object
		strings []utterance
		key     []byte
	)
	for i := 0; i < len(text); i++ {
		switch c := text[i]; c {
		case '{', '[':
			if len(open) == deepest {
				return nil, ok
			}
			open = append(open, object{from: len(strings)})
			key = nil
		case '}', ']':
			if len(open) == 0 {
				return parts, ok
			}
			o := open[len(open)-1]
			if open = open[:len(open)-1]; o.role != 0 {
				for _, s := range strings[o.from:] {
					if s.by = o.role; s.by != user {
						parts = append(parts, s)
					}
				}
				strings = strings[:o.from]
			}
			key = nil
		case '"':
			end := i + 1
			for end < len(text) && text[end] != '"' {
				if text[end] == '\\' {
					end++
				}
				end++
			}
			if end >= len(text) {
				return parts, ok
			}
			value := text[i+1 : end]
			next := end + 1
			for next < len(text) && white(text[next]) {
				next++
			}
			switch {
			case next < len(text) && text[next] == ':':
				key = value
			case string(key) == "role" && len(open) > 0:
				open[len(open)-1].role = speakerOf(value)
				ok, key = true, nil
			default:
				strings = append(strings, utterance{start: i + 1, end: end})
				key = nil
			}
			i = end
		case ',':
			key = nil
		}
	}
	return parts, ok
}

// marked reads the marks of chat templates: <|im_start|>tool … <|im_end|>, and
// <|start_header_id|>tool<|end_header_id|> … <|eot_id|>.
func marked(text []byte) (parts []utterance) {
	open := utterance{by: user}
	end := func(at int) {
		if open.end = at; open.by != user {
			parts = append(parts, open)
		}
		open.by = user
	}
	for at := 0; ; {
		n := bytes.Index(text[at:], []byte("<|"))
		if n < 0 {
			end(len(text))
			return parts
		}
		at += n
		mark, until := "", ""
		for _, m := range marks {
			if bytes.HasPrefix(text[at:], []byte(m.begin)) {
				mark, until = m.begin, m.end
			}
		}
		if mark == "" {
			at += len("<|")
			continue
		}
		end(at)
		parts = append(parts, utterance{at, at + len(mark), anybody})
		at += len(mark)
		if until == "" {
			continue
		}
		role, _, _ := bytes.Cut(text[at:min(len(text), at+longestRole)], []byte(until))
		open = utterance{start: at + len(role), by: speakerOf(bytes.TrimSpace(role))}
	}
}

// marks are those that begin what somebody says, with what ends the name of who it is, and
// those that end it.
var marks = []struct{ begin, end string }{
	{"<|im_start|>", "\n"}, {"<|start_header_id|>", "<|end_header_id|>"}, {"<|im_end|>", ""}, {"<|eot_id|>", ""},
}

// longestRole is how long such a name may be. Chosen.
const longestRole = 48

// unspoken is an engine of which nothing is asked but phrases and the score.
var unspoken = new(engine)

// roles adds the scores of what a text says in each role, where detectors of the mask ask
// for them. A text without roles is the user's. It comes after the whole was judged.
func (s *scratch) roles(text []byte, mask uint64) {
	if mask&roleMask == 0 || s.over {
		return
	}
	parts, ok := speech(text)
	if !ok {
		s.found |= scoreOf(overRates(s.score), user)
		s.scores[user] = s.score
		return
	}
	slices.SortFunc(parts, func(a, b utterance) int { return a.start - b.start })
	var said [speakers][]byte
	at := 0
	for _, p := range parts {
		said[user] = append(said[user], text[at:p.start]...)
		if at = p.end; p.by == anybody {
			continue
		}
		said[p.by] = append(append(said[p.by], text[p.start:p.end]...), '\n')
	}
	said[user] = append(said[user], text[at:]...)
	r := borrow(unspoken)
	defer r.put()
	for by := user; by < speakers; by++ {
		if len(said[by]) == 0 || mask&scoreOf(allScores, by) == 0 {
			continue
		}
		r.whole(said[by], phraseMask|allScores)
		s.over = s.over || r.over
		s.found |= scoreOf(r.found&allScores, by)
		s.scores[by] = r.score
	}
}
