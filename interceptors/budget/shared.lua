-- One gateway tells what it holds of some accounts and what it used, and asks for
-- more of all of them or none. All keys are accounts of one inference.
--
-- ARGV: gateway, number of this message, lease in ms; then for every key
--   window    its end in ms as the gateway knows it; 0: it knows no window
--   known     1: the gateway knows what it was granted; 0: it begins
--   granted, used   what it was granted in that window, and used of it
--   want, least     more of it
--   capacity, amount, length in ms
--   books     a number of the gateway's for what it tells: another where it began anew
--   gift      to be added to the account; -1: it becomes full
--   kind      '' never, 'w' window, 'b' bucket, 'c' calendar
--   end1, end2      of the calendar, by the gateway's clock
--   reserved  of what it used, by inferences that have not ended
--   overdraft how far beyond the capacity least may go
--
-- An account is a hash: d what is gone, e the window's end, at when a bucket was
-- refilled; of every gateway a: granted, u: used, t: when its lease ends, q: its
-- last message, s: spent, by inferences that have ended, b: the books that it began and what was told before them. Whatever the gateway says replaces what was known of it, so that a
-- message or an answer that was lost does no harm.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local me, number, lease = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3])
local accounts, enough = {}, 1

for i, key in ipairs(KEYS) do
  local at = 3 + (i - 1) * 16
  local function arg(n) return tonumber(ARGV[at + n]) end
  local window, known, granted, used = arg(1), arg(2) == 1, arg(3), arg(4)
  local want, least, capacity, amount, length = arg(5), arg(6), arg(7), arg(8), arg(9)
  local gift, kind, books = arg(10), ARGV[at + 11], ARGV[at + 14]
  local reserved, overdraft = arg(15), arg(16)

  local h, raw = {}, redis.call('HGETALL', key)
  for n = 1, #raw, 2 do h[raw[n]] = raw[n + 1] end
  local d, e = tonumber(h.d or '0'), tonumber(h.e or '0')

  if kind == 'b' then
    d = math.max(0, d - (now - tonumber(h.at or now)) * amount / length)
  elseif kind ~= '' and e <= now then
    -- A window begins; or the store has forgotten it, and the gateway has not.
    if e ~= 0 then redis.call('DEL', key) end
    h, d = {}, 0
    if kind == 'c' then
      e = arg(12)
      if e <= now then e = arg(13) end
      if e <= now then return { 'clock', key } end
    elseif window > now and window <= now + length then
      e = window
    else
      e = now + length
    end
  end

  if tonumber(h['q:' .. me] or '0') >= number then return { 'late', key } end

  -- Of those whose lease has ended comes back what they did not say they used. Before is
  -- what all had spent until now; others is what the others have and have not spent.
  local drop, ended, before, others = {}, {}, d, 0
  for field, value in pairs(h) do
    local who = field:match('^t:(.*)$')
    if who then
      local a, u = tonumber(h['a:' .. who] or '0'), tonumber(h['u:' .. who] or '0')
      local s = tonumber(h['s:' .. who] or u)
      before = before - (a - s)
      if who ~= me and tonumber(value) >= now then
        others = others + a - s
      elseif who ~= me then
        d = d - (a - u)
        if tonumber(value) < now - 100 * lease then
          drop[#drop + 1] = who
        else
          others = others + u - s
          if a > u then ended[#ended + 1] = { 'a:' .. who, string.format('%.0f', u) } end
        end
      end
    end
  end

  local a, base, begun = tonumber(h['a:' .. me] or '0'), 0, nil
  if kind ~= '' and kind ~= 'b' and window ~= e and window ~= 0 then
    known, used, reserved = false, 0, 0 -- what it tells of is over
  end
  if not known then
    -- It has begun anew: what it tells is beyond what it told in other books, or was
    -- granted there if the window that is over for it is this one.
    local same, told = (h['b:' .. me] or ''):match('^(%d+) (%d+)$')
    if same == books then
      base = tonumber(told) -- and no answer has reached it
    elseif window ~= 0 and window == e then
      base = a
    else
      base = tonumber(h['u:' .. me] or '0')
    end
    begun = books .. ' ' .. string.format('%.0f', base)
    used = base + used
    granted = used
  elseif h['t:' .. me] and tonumber(h['t:' .. me]) < now then
    granted = used
  end
  d = d + granted - a
  if gift < 0 then
    -- What was spent is forgotten, what gateways hold is not.
    d = granted - used
    for field, value in pairs(h) do
      local other = field:match('^t:(.*)$')
      if other and other ~= me and tonumber(value) >= now then
        d = d + tonumber(h['a:' .. other] or '0') - tonumber(h['u:' .. other] or '0')
      end
    end
  elseif gift > 0 then
    d = d - gift
    if kind == 'b' then d = math.max(0, d) end
  end
  local left, spent = math.floor(capacity - d), used - reserved
  if left + overdraft < least then enough = 0 end
  accounts[i] = { key = key, d = d, e = e, a = granted, u = used, s = spent, base = base,
    before = before, after = d - (granted - spent) - others,
    left = left, want = want, least = least, kind = kind, begun = begun, length = length, amount = amount,
    drop = drop, ended = ended }
end

local reply = { enough == 1 and 'enough' or 'short' }
for _, s in ipairs(accounts) do
  local more = 0
  if enough == 1 then
    -- Of what is scarce nobody takes more than a quarter without need.
    more = math.max(s.least, math.min(s.want, math.floor(s.left / 4)))
  end
  local d, a = s.d + more, s.a + more
  for _, pair in ipairs(s.ended) do redis.call('HSET', s.key, pair[1], pair[2]) end
  for _, other in ipairs(s.drop) do
    redis.call('HDEL', s.key, 'a:' .. other, 'u:' .. other, 's:' .. other, 't:' .. other, 'q:' .. other,
      'b:' .. other)
  end
  if s.begun then redis.call('HSET', s.key, 'b:' .. me, s.begun) else redis.call('HDEL', s.key, 'b:' .. me) end
  redis.call('HSET', s.key, 'd', string.format('%.17g', d), 'e', string.format('%.0f', s.e), 'at', string.format('%.0f', now),
    'a:' .. me, string.format('%.0f', a), 'u:' .. me, string.format('%.0f', s.u), 's:' .. me, string.format('%.0f', s.s),
    't:' .. me, string.format('%.0f', now + lease), 'q:' .. me, string.format('%.0f', number))
  local rest = -1
  if s.kind == 'b' then
    redis.call('PEXPIRE', s.key, math.ceil(d * s.length / s.amount) + 100 * lease)
  elseif s.kind ~= '' then
    rest = s.e - now
    redis.call('PEXPIRE', s.key, rest + 1000)
  end
  reply[#reply + 1] = s.key
  for _, n in ipairs({ a, s.base, s.e, rest, s.left - more, s.before, s.after }) do reply[#reply + 1] = string.format('%.0f', n) end
end
return reply
