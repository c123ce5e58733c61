package inspect

import "strings"

// vocabulary are words, in lower case without accents, that say what comes after them.
type vocabulary map[string]bool

func vocabularyOf(words string) vocabulary {
	v := make(vocabulary)
	for _, w := range strings.Fields(words) {
		v[w] = true
	}
	return v
}

var (
	phoneWords = vocabularyOf("phone telephone tel call mobile mob fax cell cellphone whatsapp sms desk hotline dial answering registered reach text " +
		"handy mobil mobilnummer telefon telefonnummer rufnummer telefono celular cellulare telefone telefoon mobiel portable telefax")
	cardWords = vocabularyOf("card cards visa mastercard amex jcb maestro kreditkarte kreditkartennummer tarjeta carte carta cartao creditcard kortnummer")
	// birthWords say that a date is one of birth. Dates in words are left alone: they are in every biography.
	birthWords = vocabularyOf("dob birth birthdate birthday born geburtsdatum geboren nacimiento nacido nacida naissance nascita nato nata nascimento " +
		"geboortedatum fodselsdato fodelsedatum syntymaaika urodzenia")
	// documentWords say that what follows is the number of a document about a person.
	documentWords = vocabularyOf("passport passeport reisepass pasaporte passaporto paspoort driver drivers driving fuhrerschein " +
		"ssn nino bsn nif pps ppsn tfn oib egn sozialversicherungsnummer")
)

// contextBytes is how far before a value a word may say what it is.
const contextBytes = 40

// introduced reports whether one of so many words before a place is of a vocabulary. A
// number in between ends what they may speak of.
func introduced(text []byte, at, words int, of vocabulary) bool {
	before := text[max(0, at-contextBytes):at]
	i := len(before)
	for range words {
		for i > 0 && !letter(before[i-1]) {
			if i--; digit(before[i]) {
				return false
			}
		}
		end := i
		for i > 0 && letter(before[i-1]) {
			i--
		}
		var low [contextBytes]byte
		for n, c := range before[i:end] {
			low[n] = c | 0x20
		}
		if of[string(low[:end-i])] {
			return true
		}
	}
	return false
}
